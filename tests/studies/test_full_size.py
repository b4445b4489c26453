"""A full-size run is what a person would type; what has finished is not run again, what was cut short goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from common.errors import RunFailedError
from common.program import own_program
from common.tracking.spool import Spool
from studies import pipeline

SUMMARY = {"steps": 2, "seconds": 9.0, "learner_idle_share": 0.1, "staleness_mean": 0.5, "staleness_max": 1}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started; each leaves a finished run behind."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        started.append(command)
        folder = tmp_path / "r"
        Spool(folder / "metrics.jsonl").append("learner", 0, {"reward": 0.5})
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pipeline.subprocess, "run", run)
    return started


def test_a_run_is_started_once(tmp_path: Path, commands: list[list[str]]) -> None:
    settings = {"run.seed": 3, "algorithm.preset": "grpo", "eval.sets": []}
    rows = pipeline.run_recipe("fig8-grpo", "r", tmp_path, settings)
    assert [row["kind"] for row in rows] == ["train", "clock"]
    assert rows[1]["seconds"] == 9.0
    assert pipeline.run_recipe("fig8-grpo", "r", tmp_path, settings) == rows
    (command,) = commands
    assert command[: len(own_program()) + 2] == [*own_program(), "run", "fig8-grpo"]
    assert {'algorithm.preset="grpo"', "run.seed=3", "eval.sets=[]", 'run.name="r"'} <= set(command)
    assert "--resume" not in command


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, commands: list[list[str]]) -> None:
    Spool(tmp_path / "r" / "metrics.jsonl").append("learner", 0, {"reward": 0.5})
    pipeline.run_recipe("fig8-grpo", "r", tmp_path, {})
    assert "--resume" in commands[0]


def test_a_failed_run_stops_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 4)
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunFailedError, match="fig8-grpo.*exit code 4"):
        pipeline.run_recipe("fig8-grpo", "r", tmp_path, {})
