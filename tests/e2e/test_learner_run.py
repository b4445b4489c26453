"""The learner process against a real broker: trains, stops in order, survives, continues, refuses."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR
from deploy.watch import ask_status
from tests.e2e.learner_world import (
    final_status,
    learner_recipe,
    pointer,
    scripted_actor,
    start_broker,
    start_learner,
    train_points,
)
from tests.learner.tiny import tiny_lm
from tests.scripted.broker import running_broker, wait_for_broker
from tests.scripted.ports import reserved_port
from tests.scripted.wait import alive, until

pytestmark = pytest.mark.e2e
PATIENCE_S = 180.0
PER_STEP = 4


def wait_until_step(recipe, step: int) -> None:
    until(lambda: step in train_points(recipe), f"step {step} is committed", PATIENCE_S)


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def test_a_run_is_trained_to_its_end_and_exported(tmp_path: Path) -> None:
    recipe = learner_recipe(tmp_path)
    with running_broker(recipe) as address, scripted_actor(address):
        learner = start_learner(address, tmp_path / "learner.log")
        try:
            assert learner.wait(PATIENCE_S) == 0, (tmp_path / "learner.log").read_text()
        finally:
            end(learner)
    points = train_points(recipe)
    assert sorted(points) == list(range(6))
    for values in points.values():
        assert values["responses"] == 16
        assert values["staleness_max"] <= recipe.batch.max_staleness
        assert values["grad_norm"] > 0
        assert 0 <= values["ratio_ess"] <= 1
        assert values["skipped_updates"] == values["invalid_responses"] == 0
    status = final_status(recipe)
    assert status["ledger"]["sum_ok"]
    assert status["ledger"]["consumed"] == 24
    assert pointer(recipe)["step"] == status["pinned"]["step"] == 6
    exported = Path(status["pinned"]["path"]) / "hf"
    trained = AutoModelForCausalLM.from_pretrained(exported)
    before = dict(tiny_lm().named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trained.named_parameters())
    assert AutoTokenizer.from_pretrained(exported).decode([3]) == "w3"


def test_terminated_it_saves_and_killed_it_continues(tmp_path: Path) -> None:
    """SIGTERM: checkpoint, exit 0. SIGKILL: the next one starts from the last checkpoint. Nothing trained twice."""
    recipe = learner_recipe(tmp_path, run={"steps": 12}, batch={"max_staleness": 2})
    log = tmp_path / "learner.log"
    with running_broker(recipe) as address, scripted_actor(address, limit=5 * PER_STEP) as actor:
        learner = start_learner(address, log)
        try:
            wait_until_step(recipe, 1)
            learner.send_signal(signal.SIGTERM)
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
            saved = pointer(recipe)["step"]
            assert saved >= 2
            actor.limit = 10 * PER_STEP
            learner = start_learner(address, log, resume=True)
            wait_until_step(recipe, saved)
            end(learner)
            actor.limit = math.inf
            learner = start_learner(address, log, resume=True)
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            end(learner)
    assert f"continuing from step {saved}" in log.read_text()
    assert sorted(train_points(recipe)) == list(range(12))
    status = final_status(recipe)
    assert status["ledger"]["sum_ok"]
    assert status["ledger"]["consumed"] == 12 * PER_STEP


def test_stopped_while_it_loads_it_leaves_without_a_checkpoint(tmp_path: Path) -> None:
    recipe = learner_recipe(tmp_path)
    log = tmp_path / "learner.log"
    with running_broker(recipe) as address:
        learner = start_learner(address, log)
        try:
            until(lambda: ask_status(address, None)["peers"].get("learner"), "it has joined", PATIENCE_S)
            learner.send_signal(signal.SIGTERM)
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
            assert ask_status(address, None)["peers"]["learner"]["farewell"].startswith(
                "left: stopped before"
            )
        finally:
            end(learner)
    assert "stopped before training began" in log.read_text()
    assert not (recipe.folder / "checkpoints" / "latest.json").exists()


def test_a_killed_broker_is_waited_for(tmp_path: Path) -> None:
    """The broker dies by SIGKILL and comes back: the same learner process goes on, nothing is trained twice."""
    with reserved_port() as port:
        _train_past_a_killed_broker(tmp_path, port)


def _train_past_a_killed_broker(tmp_path: Path, port: int) -> None:
    recipe = learner_recipe(
        tmp_path,
        run={"steps": 10},
        broker={"durability": "journal", "port": port, "dead_after_s": 60.0},
    )
    log = tmp_path / "learner.log"
    broker = start_broker(recipe, tmp_path)
    address = wait_for_broker(recipe.folder)
    with scripted_actor(address, limit=5 * PER_STEP) as actor:
        learner = start_learner(address, log)
        try:
            wait_until_step(recipe, 1)
            end(broker)
            time.sleep(2.0)  # long enough for requests to go unanswered
            broker = start_broker(recipe, tmp_path, resume=True)
            actor.limit = math.inf
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
            assert broker.wait(PATIENCE_S) == 0
        finally:
            end(learner)
            end(broker)
    status = final_status(recipe)
    assert status["ledger"]["sum_ok"]
    assert status["ledger"]["consumed"] == 10 * 4
    assert status["era"] == 1, "the learner had no reason to start again"
    assert sorted(train_points(recipe)) == list(range(10))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mismatch_ends_the_run_and_says_why(tmp_path: Path, ranks: int) -> None:
    """With several ranks too, where torchrun alone would say 1, which means: start it again."""
    recipe = learner_recipe(tmp_path, learner={"max_mismatch": 0.01, "ranks": ranks})
    log = tmp_path / "learner.log"
    with running_broker(recipe) as address, scripted_actor(address):
        learner = start_learner(address, log, ranks=ranks)
        try:
            assert learner.wait(PATIENCE_S) == EXIT_RUN_FAILED
        finally:
            end(learner)
    assert "error: step 0: engine and learner disagree by" in log.read_text()


def test_a_second_start_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    recipe = learner_recipe(tmp_path)
    (recipe.folder / "checkpoints" / "step-000002").mkdir(parents=True)
    log = tmp_path / "learner.log"
    with running_broker(recipe) as address:
        learner = start_learner(address, log)
        try:
            assert learner.wait(PATIENCE_S) == EXIT_USER_ERROR
        finally:
            end(learner)
    assert "error: run.name:" in log.read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_and_stop_together(tmp_path: Path, stage: int) -> None:
    """SIGTERM reaches all ranks, which agree on one last step; then two ranks go on, and die with their parent."""
    recipe = learner_recipe(tmp_path, run={"steps": 12}, learner={"ranks": 2, "zero_stage": stage})
    log = tmp_path / "learner.log"
    with running_broker(recipe) as address, scripted_actor(address, limit=5 * PER_STEP) as actor:
        learner = start_learner(address, log, ranks=2)
        try:
            wait_until_step(recipe, 1)
            learner.send_signal(signal.SIGTERM)
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
            saved = pointer(recipe)["step"]
            assert saved >= 2, log.read_text()
            actor.limit = 10 * PER_STEP
            learner = start_learner(address, log, ranks=2, resume=True)
            wait_until_step(recipe, saved)
            family = psutil.Process(learner.pid).children(recursive=True)
            assert len(family) == 3, "torchrun and two ranks"
            end(learner)
            until(lambda: not alive(member.pid for member in family), "the ranks die with their parent")
            actor.limit = math.inf
            learner = start_learner(address, log, ranks=2, resume=True)
            assert learner.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            end(learner)
    assert final_status(recipe)["ledger"]["consumed"] == 12 * PER_STEP
