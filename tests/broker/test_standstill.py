"""A run that stands still is noticed once, explained, and every process's stacks are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from broker import alarm
from broker.standstill import Standstill
from common.messages import Hello, StatusQuery
from common.wire import Client
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.stalling import GROUPS
from tests.scripted.wait import until

LIMIT_S = 3.0  # above what a healthy wait may last before it is said (broker.explain.SHOWN_S)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "ANSWERS_S", 1.0)


@contextmanager
def worker(module: str, *arguments: str) -> Iterator[subprocess.Popen]:
    """A scripted worker as a process; continued and killed at the end, with its children."""
    process = subprocess.Popen([sys.executable, "-m", f"tests.scripted.{module}", *arguments])
    try:
        yield process
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()
        process.wait(10)


class Eye:
    """Looks at a run from outside."""

    def __init__(self, address: str, folder: Path) -> None:
        self._client = Client(address, Hello(role="observer", peer="t", software="0.1.0", host="h", pid=1))
        self.folder = folder

    def status(self) -> dict:
        return self._client.request(StatusQuery(), timeout_s=10.0).message.status

    def stalled(self) -> bool:
        return self.status()["no_progress"]["stalled"]

    def groups(self, actor: str) -> int:
        return self.status()["peers"].get(actor, {}).get("groups", 0)

    def alarms(self) -> list[str]:
        return [event["text"] for event in self.status()["events"] if event["text"].startswith("no progress")]

    def stacks(self, who: str) -> str:
        """Of the newest standstill: on a busy machine, starting may take long enough for one of its own."""
        found = sorted((self.folder / "stacks").glob(f"*-{who}.txt"))
        return found[-1].read_text() if found else ""

    def stacks_of_stopped(self, pid: int) -> str:
        """As written while process `pid` was stopped, by whoever asked it: the broker, whose child it is here, asks
        for its own family too, and once woken for that the process may answer by itself."""
        files = map(Path.read_text, sorted((self.folder / "stacks").glob("*.txt")))
        return next((text for text in files if f"process {pid} (stopped)" in text), "")

    def metric(self, name: str) -> float:
        port = json.loads((self.folder / "broker.json").read_text())["metrics_port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))


@contextmanager
def run(tmp_path: Path, dead_after_s: float = 60.0) -> Iterator[tuple[Eye, str]]:
    recipe = scripted_recipe(
        tmp_path,
        run={"steps": 10_000},
        data={"count": 400, "max_epochs": 1000},
        broker={"no_progress_s": LIMIT_S, "heartbeat_s": 0.1, "dead_after_s": dead_after_s, "lease_s": 600.0},
    )
    with running_broker(recipe) as address:
        yield Eye(address, recipe.folder), address


def learner(tmp_path: Path, address: str) -> tuple[str, ...]:
    return "learner", address, "--checkpoint", str(tmp_path / "checkpoint.json")


@pytest.mark.parametrize("how", ["deadlock", "helper"])
def test_deadlocked_actor(tmp_path: Path, how: str) -> None:
    with (
        run(tmp_path) as (eye, address),
        worker(*learner(tmp_path, address)),
        worker("stalling", how, address, "--name", "actor-0"),
    ):
        until(lambda: eye.groups("actor-0") == GROUPS, "the actor works at first")
        until(eye.stalled, "the standstill is noticed")
        until(lambda: "wait_for_ever_on_a_lock" in eye.stacks("actor-0"), "where the actor hangs")
        until(lambda: "_heartbeats" in eye.stacks("learner"), "stacks of a learner in good health")
        until(lambda: "in serve" in eye.stacks("broker"), "the broker's own, whatever thread serves")

        said = eye.alarms()
        assert "the learner waits for actor-0" in said[-1]
        assert "stacks" in said[-1]
        until(lambda: eye.metric('slipstream_run{what="stalled"}') == 1.0, "the metrics page says so")
        assert eye.metric('slipstream_run{what="standstills"}') == len(said)
        until(lambda: eye.status()["no_progress"]["seconds"] > 2 * LIMIT_S, "it lasts")
        assert eye.alarms() == said, "one standstill, one alarm"
        lines = (eye.folder / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines if '"kind": "event"' in line]
        assert sum(event["values"]["text"] == said[-1] for event in events) == 1


def test_frozen_learner_that_was_given_up_for_dead(tmp_path: Path) -> None:
    with (
        run(tmp_path, dead_after_s=2.0) as (eye, address),
        worker(*learner(tmp_path, address)) as frozen,
        worker("actor", address, "--name", "actor-0"),
    ):
        until(lambda: eye.status()["step"] >= 2, "the run goes on")
        frozen.send_signal(signal.SIGSTOP)
        until(eye.stalled, "the standstill is noticed")
        until(lambda: eye.stacks_of_stopped(frozen.pid), "stacks of a process that cannot answer")
        assert "_heartbeats" in eye.stacks_of_stopped(frozen.pid)
        until(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED, "it is left as it was")
        until(lambda: eye.stacks("actor-0"), "the actor waits in good health, and is asked too")

        frozen.send_signal(signal.SIGCONT)
        until(lambda: not eye.stalled(), "progress ends the standstill")
        assert eye.status()["no_progress"]["stacks"] is None
        step = eye.status()["step"]
        until(lambda: eye.status()["step"] > step, "the run goes on")


def test_run_without_a_worker_is_explained(tmp_path: Path) -> None:
    with run(tmp_path) as (eye, _):
        until(eye.stalled, "the standstill is noticed")
        (said,) = eye.alarms()
        assert "no actor has joined" in said
        assert "no learner has joined" in said
        until(lambda: eye.stacks("broker"), "the broker's own stacks")


def test_peer_that_did_not_ask_is_never_signalled(tmp_path: Path) -> None:
    """A process number in a Hello is a claim: a process that is not ours must not be sent a deadly signal."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with run(tmp_path) as (eye, address):
            hello = Hello(
                role="actor", peer="liar", software="0.1.0", host=os.uname().nodename, pid=victim.pid
            )
            Client(address, hello).connect(10.0)
            until(eye.stalled, "the standstill is noticed")
            until(
                lambda: any("no stacks from liar" in event["text"] for event in eye.status()["events"]),
                "who could not be asked is named",
            )
            assert victim.poll() is None
            assert not eye.stacks("liar")
    finally:
        victim.kill()
        victim.wait()


def test_one_alarm_per_standstill() -> None:
    still = Standstill(10.0)
    assert not still.look("a", 0.0, over=False)
    assert [still.look("a", now, over=False) for now in (9.9, 10.0, 11.0, 99.0)] == [
        False,
        True,
        False,
        False,
    ]
    assert (still.alarmed, still.alarms) == (True, 1)
    assert not still.look("b", 100.0, over=False)
    assert not still.alarmed
    still.excuse(5.0)
    assert [still.look("b", now, over=False) for now in (114.0, 115.0)] == [False, True]
    assert not any(still.look("b", now, over=True) for now in (200.0, 300.0)), (
        "a run that ends need not get on"
    )
