"""`slipstream study` from the command line: bad input, listing, delivery to MLflow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import EXIT_USER_ERROR
from deploy.cli import main
from studies import STUDIES, report
from studies.length_bias import LengthBias
from studies.runner import run_study
from studies.study import Budget, Setting


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["study", *arguments])
    assert end.value.code == EXIT_USER_ERROR
    return capsys.readouterr().err


def test_unknown_study_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "dr-gpro")
    assert said.startswith("error: NAME: unknown study 'dr-gpro'")
    assert all(name in said for name in STUDIES)


def test_an_endpoint_needs_a_model_and_full_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    url = ("--endpoint", "http://127.0.0.1:9")
    assert "--endpoint-model: " in complaint(capsys, "templates", "--full", *url, *out)
    assert "add --full" in complaint(capsys, "templates", *url, "--endpoint-model", "m", *out)
    assert not list(tmp_path.iterdir())


def test_rows_of_another_setting_are_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "length-bias"
    run_study(LengthBias(), Setting(Budget.SECONDS, (0,), folder, tmp_path / "zoo"))
    before = (folder / "rows.jsonl").read_bytes()
    said = complaint(capsys, "length-bias", "--out", str(tmp_path), "--no-track")
    assert "--out: " in said
    assert "--fresh" in said
    assert (folder / "rows.jsonl").read_bytes() == before


def test_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "list"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in STUDIES)


@pytest.mark.nightly  # MLflow takes 10 s to make its store
def test_results_reach_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    setting = Setting(Budget.SECONDS, (0, 1, 2), tmp_path / "length-bias", tmp_path / "zoo")
    verdict = run_study(LengthBias(), setting)
    report.upload(LengthBias(), setting, verdict)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(report.EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.tags["outcome"] == str(verdict.outcome)
    assert found.data.metrics["expectation_0"] == 1.0
    kept = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"figure.png", "report.md", "rows.jsonl", "verdict.json"} <= kept


def test_a_store_that_is_away_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "_upload", lambda *_: (_ for _ in ()).throw(OSError("away")))
    setting = Setting(Budget.SECONDS, (0,), tmp_path, tmp_path)
    report.upload(LengthBias(), setting, LengthBias().judge([{"kind": "none"}]))
    assert "did not take" in caplog.text
    assert os.listdir(tmp_path) == []
