"""Ctrl-C ends a run in order, also with a stuck child, and leaves no process; --resume finishes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.scripted.wait import alive, until

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 20
SETTINGS = {
    "run.steps": STEPS,
    "model.path": f"'{REPOSITORY / 'models' / 'minimath-base'}'",
    "batch.questions_per_step": 8,
    "learner.checkpoint_every": 4,
    "eval.limit": 8,
    "eval.samples": 1,
}


def start(root: Path, *options: str) -> subprocess.Popen:
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    recipe = str(REPOSITORY / "recipes" / "demo.toml")
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "deploy",
            "run",
            recipe,
            "--quiet",
            "--set",
            f"run.root='{root}'",
            *settings,
            *options,
        ],
        cwd=REPOSITORY,
        stdout=(root / "out.txt").open("a"),
        stderr=subprocess.STDOUT,
    )


def step_of(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return -1
    return max((json.loads(line)["step"] for line in lines if '"kind": "learner"' in line), default=-1)


def until_while_it_runs(happened: Callable[[], bool], folder: Path, launcher: subprocess.Popen) -> None:
    output = (folder.parent / "out.txt").read_text

    def so() -> bool:
        assert launcher.poll() is None, output()
        return happened()

    until(so, output, seconds=200, every=0.1)


def until_step(folder: Path, step: int, launcher: subprocess.Popen) -> None:
    until_while_it_runs(lambda: step_of(folder) >= step, folder, launcher)


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def mlflow_run(folder: Path) -> str | None:
    try:
        return json.loads((folder / "tracking.json").read_text())["mlflow_run"]
    except OSError:
        return None


@pytest.mark.e2e
def test_ctrl_c_with_a_stuck_actor_then_resume(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    launcher = start(tmp_path)
    until_step(folder, 1, launcher)
    children = family(launcher.pid)
    stuck = next(child for child in children if "actor-0" in child.cmdline())
    stuck.send_signal(signal.SIGSTOP)  # from here on the run cannot end by itself
    until_while_it_runs(lambda: mlflow_run(folder) is not None, folder, launcher)
    children = family(launcher.pid)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(180) == 130, (tmp_path / "out.txt").read_text()
    until(lambda: not alive(child.pid for child in children), "no process is left")
    assert len(children) >= 3
    done = step_of(folder)
    assert done < STEPS - 1, "the run must have been interrupted"
    saved = json.loads((folder / "checkpoints" / "latest.json").read_text())["step"]
    assert saved == done + 1, "the last step is in the checkpoint"
    first = mlflow_run(folder)
    assert f"MLflow: run {first}" in (folder / "run.log").read_text(), "where to look is said"

    again = start(tmp_path, "--resume")
    assert again.wait(250) == 0, (tmp_path / "out.txt").read_text() + (folder / "learner.log").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    ledger = summary["ledger"]
    assert ledger["sum_ok"]
    assert ledger["consumed"] + ledger["filtered"] == STEPS * 8
    assert mlflow_run(folder) == first, "a resumed run continues its MLflow run"
    assert os.path.exists(folder / "progress.png")
