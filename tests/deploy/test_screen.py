"""The status screen: everything of a run that a person looks for, on one screen."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.screen import DASH, GONE_SHOWN, PEERS_SHOWN, eta, screen
from deploy.watch import ask_status
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until


def drawn(status: Mapping[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=200, height=60)
    console.print(screen(status, title="t"))
    return console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def status(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a real broker after some steps with scripted peers."""
    folder: Path = tmp_path_factory.mktemp("run")
    recipe = scripted_recipe(folder, run={"steps": 1000}, data={"count": 4000})
    with running_broker(recipe) as address:
        workers = [ScriptedActor(address, "actor-0"), ScriptedLearner(address, folder / "checkpoint.json")]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        until(lambda: ask_status(address, None)["step"] >= 3)
        found = ask_status(address, None)
        for worker, thread in zip(workers, threads, strict=True):
            worker.stop()
            thread.join(10)
    return found


def line_of(lines: list[str], words: str) -> str:
    """The first line with these words: figures and peers stand above waits and events."""
    return next(line for line in lines if words in line)


def test_one_screen_says_it_all(status: dict[str, Any]) -> None:
    lines = drawn(status)
    assert f"step {status['step']}/1000" in lines[1]
    for words in ("reward", "held-out", "tokens/s", "staleness", "queue", "leases", "weights", "mismatch"):
        assert any(words in line for line in lines), words
    rate = status["peers"]["actor-0"]["tokens_per_s"]
    assert f"{rate:,.0f} tokens/s" in line_of(lines, "actor-0")
    queue, leases = status["queue"], status["leases"]["count"]
    assert f"{queue['untaken'] - leases} buffered, {leases} in flight" in line_of(lines, "queue")
    assert len(lines) < 25


def test_gpu_use_and_weight_push_per_worker(status: dict[str, Any]) -> None:
    actor = status["peers"]["actor-0"] | {"telemetry": {"gpu0_use": 0.5, "gpu1_use": 0.7, "cpu_cores": 1.0}}
    meters = {"push_send_s": 0.25, "push_stopped_ms": 12.0, "push_versions_behind": 1.0, "push_failures": 2.0}
    learner = status["peers"]["learner"] | {"telemetry": meters}
    lines = drawn(status | {"peers": {"actor-0": actor, "learner": learner}})
    assert "GPU 60%" in line_of(lines, "actor-0")
    said = line_of(lines, "sent in")
    assert "sent in 0.25 s, engines stopped 12 ms, furthest behind 1, broken links 2" in said


def test_a_thousand_actors_fit(status: dict[str, Any]) -> None:
    actor = status["peers"]["actor-0"]
    gone = actor | {"alive": False, "farewell": "dead: not heard of for 30 s"}
    many = {f"a{number}": actor for number in range(1000)} | {f"g{number}": gone for number in range(50)}
    lines = drawn(status | {"peers": many | {"learner": status["peers"]["learner"]}})
    assert len(lines) < 25 + PEERS_SHOWN + GONE_SHOWN
    assert line_of(lines, f"and {1001 - PEERS_SHOWN} more")
    assert sum("gone: dead" in line for line in lines) == GONE_SHOWN
    assert line_of(lines, "│ learner"), "whatever is left out, it is not the learner"


def test_warnings_and_waits_are_seen(status: dict[str, Any]) -> None:
    wait = {"who": "learner", "for": "actor-0", "seconds": 9.0, "groups_missing": 3}
    event = {"time": 0.0, "step": 1, "text": "actor actor-9 dead: not heard of for 30 s", "warning": True}
    lines = drawn(status | {"waits": [wait], "events": [event]})
    assert "3 groups are missing" in line_of(lines, "the learner waits for actor-0")
    assert line_of(lines, "actor-9 dead")


def test_before_the_broker_answers() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(screen(None, title="t"))
    assert "starting broker, actors and learner" in console.file.getvalue()


def test_time_to_the_end_also_of_a_resumed_run() -> None:
    """A resumed run may have lain still for days: the pace of its newest step counts."""
    usual = {"finished": False, "steps_total": 10, "step": 4, "first_lease_time": 100.0, "train": None}
    assert eta(usual, now=140.0) == "1:00"
    step = {"seconds_waiting": 1.0, "seconds_training": 10.0, "seconds_publishing": 1.0}
    assert eta(usual | {"resumed": True, "train": step}, now=1e6) == "1:12"
    assert eta(usual | {"resumed": True}, now=1e6) == DASH
    assert eta(usual | {"step": 0}, now=140.0) == DASH
    assert eta(usual | {"step": 10}) == "done"
