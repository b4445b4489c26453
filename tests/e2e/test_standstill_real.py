"""A real run whose engine freezes: every process's stacks are kept, and the run goes on when the engine does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from test_interrupt import family, start, step_of, until_step

from deploy.folder import read_address
from deploy.watch import ask_status
from tests.scripted.wait import alive, until

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
def test_a_frozen_engine_is_found_by_its_stacks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "demo"
    launcher = start(tmp_path, "--set", "broker.no_progress_s=10.0", "--set", "run.steps=400")
    request.addfinalizer(launcher.kill)  # its workers die with it
    until_step(folder, 1, launcher)
    children, engine = family(launcher.pid), engine_of(launcher)
    os.kill(engine.pid, signal.SIGSTOP)

    def kept() -> dict[str, str]:
        """Stacks by process, of the alarm that found the actor (starting took long enough for one of its own)."""
        found = sorted(folder.glob("stacks/*-actor-0.txt"))
        files = folder.glob(f"stacks/{found[-1].name.removesuffix('-actor-0.txt')}-*.txt") if found else []
        return {path.stem.split("-", 2)[2]: path.read_text() for path in files}

    until(
        lambda: "run_busy_loop" in kept().get("actor-0", "") and len(kept()) >= 3,
        (tmp_path / "out.txt").read_text,
        seconds=300,
        every=0.5,
    )
    texts = kept()
    assert set(texts) == {"broker", "learner", "actor-0"}
    assert "track_run" in texts["broker"], "the tracker is a child of the broker's"
    assert "in next" in texts["learner"], texts["learner"]
    assert f"=== process {engine.pid} (stopped)" in texts["actor-0"]
    found = read_address(folder)
    assert found is not None
    events = ask_status(found["address"], None)["events"]
    said = [event["text"] for event in events if event["text"].startswith("no progress")]
    assert "the learner waits for actor-0" in said[-1]

    step = step_of(folder)
    os.kill(engine.pid, signal.SIGCONT)
    until_step(folder, step + 1, launcher)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(180) == 130
    until(lambda: not alive(child.pid for child in children), "no process is left")
