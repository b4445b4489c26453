"""A run on a real Slurm: submitted, scaled, hurt, requeued, finished with every question accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.recipe import load_recipe
from deploy.slurm import queue
from deploy.slurm.plan import Options, cluster_overrides
from deploy.slurm.scale import scale
from deploy.slurm.state import read_state
from deploy.slurm.submit import submit_recipe
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import final, seen
from tests.slurm.recipes import write_recipe

pytestmark = pytest.mark.slurm


def send(recipe: Path, program: tuple[str, ...], **changes) -> Path:
    """Submit as the verb does, with another program; returns the run folder."""
    options = Options(**{"learner_nodes": 1, "actors": 2, "partition": "main", **changes})
    resolved = load_recipe(recipe, cluster_overrides(load_recipe(recipe), options))
    submit_recipe(resolved, options, program=program)
    return resolved.folder.resolve()


def actors_at_work(name: str = "demo") -> list[int]:
    """Indices of the actors that Slurm runs."""
    tasks = queue.queued(f"slipstream-{name}-actors")
    return sorted(task.index for task in tasks if task.state == "RUNNING" and task.index is not None)


def step_of(folder: Path) -> int:
    """Steps that the learner has saved."""
    try:
        return len(json.loads((folder / "checkpoint.json").read_text()))
    except OSError:
        return 0


def assert_whole(folder: Path, steps: int) -> None:
    """The run is finished: each question trained on once, and the ledger's sum holds (I2, I3)."""
    wait_until(lambda: final(folder), 120, "the run ends")
    end = final(folder)
    assert end is not None
    assert end["status"] == "finished", end
    ledger = end["final"]["ledger"]
    assert ledger["sum_ok"], ledger
    history = [key for groups in json.loads((folder / "checkpoint.json").read_text()) for key in groups]
    assert len(history) == len(set(history)) == 4 * steps - ledger["filtered"]
    wait_until(lambda: not queue.queued("slipstream-demo"), 60, "the head job ends")
    wait_until(lambda: not queue.queued("slipstream-demo-actors"), 60, "no actor is left")


def test_scaled_hurt_and_requeued_run_ends_whole(cluster: Cluster, shared: Path, program):
    steps = 400
    folder = send(write_recipe(shared, steps=steps), program)
    state = read_state(folder)
    wait_until(lambda: actors_at_work() == [0, 1], 60, "two actors run")
    wait_until(lambda: step_of(folder) > 0, 60, "a first checkpoint")
    address = json.loads((folder / "broker.json").read_text())["address"]
    assert not address.startswith("127."), "the broker must be reachable from other nodes"

    scale(str(folder), actors=5)
    wait_until(lambda: actors_at_work() == [0, 1, 2, 3, 4], 60, "five actors run")
    wait_until(lambda: len(seen(folder, what="started")) >= 7, 60, "all have joined")

    scale(str(folder), actors=3)
    wait_until(lambda: actors_at_work() == [0, 1, 2], 60, "actors 3 and 4 have left")
    assert seen(folder, "actor-3", "left"), "an actor that goes is asked first"
    assert seen(folder, "actor-4", "left")

    cluster.requeue(f"{state.arrays[0]}_0")
    wait_until(lambda: len(seen(folder, "actor-0", "started")) == 2, 60, "actor 0 rejoins")

    before = step_of(folder)
    cluster.requeue(str(state.head))
    wait_until(lambda: len(seen(folder, "learner", "started")) == 2, 90, "the learner is back")
    wait_until(lambda: step_of(folder) > before, 60, "it trains on")
    assert_whole(folder, steps)
