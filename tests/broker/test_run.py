"""Whole runs over real sockets: a real broker, scripted actors, a scripted learner."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.messages import Hello, StatusQuery
from common.tracking.spool import read_spool
from common.wire import Client
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner


def start(worker: ScriptedActor | ScriptedLearner) -> threading.Thread:
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    return thread


def ask_status(address: str) -> dict:
    hello = Hello(role="observer", peer="test", software="0.1.0", host="test", pid=1)
    client = Client(address, hello)
    try:
        return client.request(StatusQuery(groups=True), timeout_s=10.0).message.status
    finally:
        client.close()


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize(("prefetch", "durability"), [(False, "journal"), (True, "memory")])
def test_a_run_trains_on_each_question_once(
    tmp_path: Path, staleness: int, prefetch: bool, durability: str
) -> None:
    recipe = scripted_recipe(
        tmp_path,
        run={"steps": 10},
        data={"count": 40},
        batch={"max_staleness": staleness},
        broker={"durability": durability},
    )
    with running_broker(recipe) as address:
        actors = [ScriptedActor(address, f"actor-{i}", seed=i, group_s=0.002) for i in range(3)]
        learner = ScriptedLearner(address, tmp_path / "checkpoint.json", step_s=0.0, prefetch=prefetch)
        threads = [start(worker) for worker in (*actors, learner)]
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()
    trained = [key for step in learner.history for key in step]
    assert sorted(trained) == sorted(f"0:{i}" for i in range(40))
    assert all(len(step) == 4 for step in learner.history)
    ages = [
        batch.step - version
        for batch in learner.batches
        for header in batch.groups
        for response in header.responses
        for version, _ in response.versions
    ]
    assert max(ages) <= staleness
    end = list(read_spool(recipe.folder / "metrics.jsonl"))[-1]
    assert end.kind == "end"
    assert end.values["status"] == "finished"
    ledger = end.values["final"]["ledger"]
    assert ledger["sum_ok"]
    assert ledger["consumed"] == 40
    assert ledger["expired"] == 0


def test_status_tells_who_is_there_and_who_waits(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, run={"steps": 3})
    with running_broker(recipe) as address:
        learner = ScriptedLearner(address, tmp_path / "checkpoint.json")
        start(learner)
        while not learner.reasons:
            learner._stopping.wait(0.02)
        status = ask_status(address)
        learner.stop()
    assert status["peers"]["learner"]["alive"]
    assert status["waits"][0]["who"] == "learner"
    assert "waiting for an actor to join" in learner.reasons[0]
    assert status["groups"] == []
