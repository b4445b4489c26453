"""A real run whose engine freezes: every process's stacks are kept, and the run goes on when the engine does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_interrupt import family, start, step_of, until_step

from deploy.folder import read_address
from deploy.watch import ask_status

HELPERS = ("multiprocessing.spawn", "multiprocessing.resource_tracker")


def engine_of(launcher: subprocess.Popen) -> psutil.Process:
    """The engine process of actor-0: its child that is none of the verifier's."""
    (actor,) = [p for p in psutil.Process(launcher.pid).children() if "actor-0" in p.cmdline()]
    children = [
        child for child in actor.children() if not any(h in " ".join(child.cmdline()) for h in HELPERS)
    ]
    (engine,) = children
    return engine


@pytest.mark.e2e
@pytest.mark.nightly
def test_a_frozen_engine_is_found_by_its_stacks(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    launcher = start(tmp_path, "--set", "broker.no_progress_s=10.0", "--set", "run.steps=400")
    until_step(folder, 1, launcher)
    children, engine = family(launcher.pid), engine_of(launcher)
    os.kill(engine.pid, signal.SIGSTOP)

    def said() -> list[str]:
        found = read_address(folder)
        assert found is not None
        events = ask_status(found["address"], None)["events"]
        return [event["text"] for event in events if event["text"].startswith("no progress")]

    deadline = time.monotonic() + 120
    while len(list(folder.glob("stacks/*.txt"))) < 3 or not said():
        assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
        time.sleep(0.5)
    texts = {path.stem.split("-", 2)[2]: path.read_text() for path in folder.glob("stacks/*.txt")}
    assert set(texts) == {"broker", "learner", "actor-0"}
    assert "track_run" in texts["broker"], "the tracker is a child of the broker's"
    assert "in next" in texts["learner"], "it waits for its next batch"
    assert f"=== process {engine.pid} (stopped)" in texts["actor-0"]
    assert "run_busy_loop" in texts["actor-0"]
    (sentence,) = said()
    assert "the learner waits for actor-0" in sentence

    step = step_of(folder)
    os.kill(engine.pid, signal.SIGCONT)
    until_step(folder, step + 1, launcher)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    assert not [p for p in psutil.wait_procs(children, timeout=5)[1] if p.status() != psutil.STATUS_ZOMBIE]
