"""Points reach a real MLflow store once each, across outages, crashes and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from common.tracking import shipper as sh
from common.tracking.spool import Record, Spool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sh.tracking_uri(None, tmp_path_factory.mktemp("mlflow"))


def shipper(folder: Path, uri: str) -> sh.Shipper:
    return sh.Shipper(folder, uri, "tests", folder.name)


def history(uri: str, run: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run, name)]


def test_a_run_is_delivered_whole_and_a_resumed_one_continues_it(tmp_path: Path, store: str) -> None:
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("run", 0, {"recipe": {"learner": {"lr": 1e-6}, "run": {"name": "x"}}})
    spool.append("train", 0, {"train/reward": 0.25, "text": "ignored"})
    spool.append("broker", 0, {"buffered": 3})
    spool.append("samples", 0, {"rows": [{"question": "1+1", "reward": 1.0}]})
    first = shipper(tmp_path, store)
    assert first.deliver() is None
    spool.append("end", 1, {"status": "stopped"})
    end = first.deliver()
    assert isinstance(end, Record)
    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    first.finish(end, [summary])

    spool.append("run", 1, {"recipe": {"learner": {"lr": 1e-6}, "run": {"name": "x"}}})
    spool.append("train", 1, {"train/reward": 0.5})
    second = shipper(tmp_path, store)
    assert second.deliver() is None, "an end that a resume follows is not the end"
    run = second._run_id
    assert run == first._run_id
    assert history(store, run, "train/reward") == [(0, 0.25), (1, 0.5)]
    assert history(store, run, "broker/buffered") == [(0, 3.0)]
    found = MlflowClient(store).get_run(run)
    assert found.data.params["learner.lr"] == "1e-06"
    assert found.info.status == "RUNNING"
    names = {a.path for a in MlflowClient(store).list_artifacts(run)}
    assert {"summary.json", "samples.json"} <= names


def test_an_outage_keeps_points(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sh, "RETRY_S", 0.01)
    monkeypatch.setattr(sh, "POLL_S", 0.01)
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("train", 0, {"train/reward": 1.0})
    spool.append("end", 1, {"status": "finished"})
    one = shipper(tmp_path, store)
    fails = iter([True, True, False])
    connect = one._connect

    def flaky() -> MlflowClient:
        if next(fails, False):
            raise ConnectionError("away")
        return connect()

    monkeypatch.setattr(one, "_connect", flaky)
    finalised: list[Record] = []

    def finalise(end: Record) -> list[Path]:
        finalised.append(end)
        return []

    assert sh.ship_until_end(one, finalise)
    assert len(finalised) == 1
    assert history(store, one._run_id, "train/reward") == [(0, 1.0)]
    assert MlflowClient(store).get_run(one._run_id).info.status == "FINISHED"


def test_a_store_that_never_answers_is_given_up_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sh, "RETRY_S", 0.01)
    Spool(tmp_path / "metrics.jsonl").append("end", 1, {"status": "finished"})
    (tmp_path / "file").write_text("")
    one = shipper(tmp_path, f"sqlite:///{tmp_path}/file/mlflow.db")
    assert not sh.ship_until_end(one, lambda end: [], patience_s=0.05)
