"""The demo on a real Slurm, with every real part: DeepSpeed learner, vLLM actors, CURVE keys between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.recipe import load_recipe
from common.recipe.load import REPOSITORY
from deploy.slurm import queue
from deploy.slurm.plan import Options, cluster_overrides
from deploy.slurm.scale import scale_array
from deploy.slurm.state import read_state
from deploy.slurm.submit import submit_recipe
from tests.deploy.dashboards import selectors
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import final
from tests.slurm.test_slurm_run import actors_at_work

pytestmark = [pytest.mark.slurm, pytest.mark.e2e, pytest.mark.nightly]
STEPS = 14
START_S = 240.0  # an engine on a busy machine


@pytest.fixture
def submitted(cluster: Cluster, shared: Path, monkeypatch) -> Iterator[Path]:
    """Run folder of the demo, submitted with one actor."""
    monkeypatch.chdir(REPOSITORY)  # where the recipe's model is
    changes = [f'run.root="{shared / "runs"}"', f"run.steps={STEPS}", 'run.name="demo"', "eval.sets=[]"]
    changes += ["learner.checkpoint_every=2", "tracking.enabled=false", 'launch.device="cpu"']
    options = Options(learner_nodes=1, actors=1, partition="main")
    recipe = load_recipe("demo", changes)
    resolved = load_recipe("demo", [*changes, *cluster_overrides(recipe, options)])
    submit_recipe(resolved, options)
    yield resolved.folder
    queue.cancel(task.label for name in ("", "-actors") for task in queue.queued(f"slipstream-demo{name}"))


def points(folder: Path, kind: str) -> list[dict]:
    """Points of one kind in metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [point for point in map(json.loads, lines) if point["kind"] == kind]


def steps_done(folder: Path) -> int:
    """Steps that the broker has committed."""
    return max((point["step"] for point in points(folder, "learner")), default=-1) + 1


def joined(folder: Path, name: str) -> int:
    """How often an engine of this name has come up."""
    try:
        return (folder / "slurm" / f"{name}.log").read_text().count("starting vLLM")
    except OSError:
        return 0


def assert_dashboard_knows(train: list[dict]) -> None:
    """The dashboard asks for metrics that a real learner reports."""
    reported = {name for point in train for name in point["values"]}
    asked = [labels["name"] for metric, labels in selectors() if metric == "slipstream_learner"]
    assert asked
    assert all(any(pattern.fullmatch(name) for name in reported) for pattern in asked)


def test_the_demo_survives_scaling_and_requeues(cluster: Cluster, submitted: Path):
    folder, state = submitted, read_state(submitted)
    wait_until(lambda: steps_done(folder) >= 2, "the first steps are trained", START_S)

    scale_array(folder, 2)
    wait_until(
        lambda: actors_at_work() == [0, 1] and joined(folder, "actor-1"), "a second actor works", START_S
    )
    scale_array(folder, 1)
    wait_until(lambda: actors_at_work() == [0], "it has left again", START_S)

    cluster.requeue(f"{state.arrays[0]}_0")
    wait_until(lambda: joined(folder, "actor-0") == 2, "a requeued actor comes back", START_S)
    before = steps_done(folder)
    cluster.requeue(str(state.head))
    wait_until(lambda: steps_done(folder) > before, "a requeued learner trains on", START_S)

    wait_until(lambda: final(folder), "the run ends", 2 * START_S)
    end = final(folder)
    assert end is not None
    assert end["status"] == "finished"
    assert end["final"]["step"] == STEPS
    assert end["final"]["ledger"]["sum_ok"], end["final"]["ledger"]
    assert_dashboard_knows(points(folder, "learner"))
    assert "continuing from step" in (folder / "learner.log").read_text()
    wait_until(
        lambda: not queue.queued("slipstream-demo") + queue.queued("slipstream-demo-actors"), "all leave", 60
    )
