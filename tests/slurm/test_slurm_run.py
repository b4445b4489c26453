"""A run on a real Slurm: submitted, scaled, hurt, requeued, finished with every question accounted for."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from common.recipe import load_recipe
from deploy.slurm import queue
from deploy.slurm.plan import Options, cluster_overrides
from deploy.slurm.scale import scale_array
from deploy.slurm.state import read_state
from deploy.slurm.submit import submit_recipe
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import final, seen
from tests.slurm.recipes import write_recipe

pytestmark = pytest.mark.slurm


def send(recipe: Path, program: tuple[str, ...], *, resume: bool = False, **changes) -> Path:
    """Submit as the verb does, with another program; returns the run folder."""
    options = Options(**{"learner_nodes": 1, "actors": 2, "partition": "main", **changes})
    resolved = load_recipe(recipe, cluster_overrides(load_recipe(recipe), options))
    submit_recipe(resolved, options, program=program, resume=resume)
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
    wait_until(lambda: final(folder), "the run ends", 120)
    end = final(folder)
    assert end is not None
    assert end["status"] == "finished", end
    ledger = end["final"]["ledger"]
    assert ledger["sum_ok"], ledger
    history = [key for groups in json.loads((folder / "checkpoint.json").read_text()) for key in groups]
    assert len(history) == len(set(history)) == 4 * steps - ledger["filtered"]
    wait_until(lambda: not queue.queued("slipstream-demo"), "the head job ends", 60)
    wait_until(lambda: not queue.queued("slipstream-demo-actors"), "no actor is left", 60)


def test_scaled_hurt_and_requeued_run_ends_whole(cluster: Cluster, shared: Path, program):
    steps = 200
    folder = send(write_recipe(shared, steps=steps), program)
    state = read_state(folder)
    wait_until(lambda: actors_at_work() == [0, 1], "two actors run", 60)
    wait_until(lambda: step_of(folder) > 0, "a first checkpoint", 60)
    address = json.loads((folder / "broker.json").read_text())["address"]
    assert not address.startswith("127."), "the broker must be reachable from other nodes"

    scale_array(folder, 5)
    wait_until(lambda: actors_at_work() == [0, 1, 2, 3, 4], "five actors run", 60)
    wait_until(lambda: len(seen(folder, what="started")) >= 7, "all have joined", 60)

    scale_array(folder, 3)
    wait_until(lambda: actors_at_work() == [0, 1, 2], "actors 3 and 4 have left", 60)
    assert seen(folder, "actor-3", "left"), "an actor that goes is asked first"
    assert seen(folder, "actor-4", "left")

    cluster.requeue(f"{state.arrays[0]}_0")
    wait_until(lambda: len(seen(folder, "actor-0", "started")) == 2, "actor 0 rejoins", 60)

    before = step_of(folder)
    cluster.requeue(str(state.head))
    wait_until(lambda: len(seen(folder, "learner", "started")) == 2, "the learner is back", 90)
    wait_until(lambda: step_of(folder) > before, "it trains on", 60)
    assert_whole(folder, steps)


def test_near_the_time_limit_a_job_saves_and_queues_again(cluster: Cluster, shared: Path, program):
    steps = 120
    folder = send(write_recipe(shared, steps=steps), program, time="10:00")
    state = read_state(folder)
    wait_until(lambda: step_of(folder) > 0, "a first checkpoint", 60)
    # What --signal=B:USR1@... does before the limit.
    cluster.ask("scancel", "--batch", "--signal=USR1", str(state.head), f"{state.arrays[0]}_1")
    wait_until(lambda: seen(folder, "learner", "left"), "the learner has saved and left", 30)
    wait_until(lambda: seen(folder, "actor-1", "left"), "the actor has left in order", 30)
    wait_until(lambda: 1 not in actors_at_work(), "its task is back in the queue", 30)
    for label in (str(state.head), f"{state.arrays[0]}_1"):
        cluster.start_again(label)
    assert_whole(folder, steps)
    assert len(seen(folder, "learner", "started")) == 2
    assert len(seen(folder, "actor-1", "started")) == 2


def test_ranks_of_several_nodes_meet_and_gpus_are_shared_out(cluster: Cluster, shared: Path, program):
    recipe = write_recipe(shared, steps=3)
    text = recipe.read_text().replace('device = "cpu"', 'device = "gpu"')
    recipe.write_text(text + "\n[actor]\ntensor_parallel = 2\n")
    nodes = {"learner_nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 2}
    folder = send(recipe, program, actors=1, interface="lo", **nodes)
    assert_whole(folder, 3)
    ranks = sorted(
        (line for line in seen(folder) if line["who"].startswith("rank ")), key=lambda line: line["who"]
    )
    assert [line["who"] for line in ranks] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert {line["what"] for line in ranks} == {"sum 10"}
    assert [line["LOCAL_RANK"] for line in ranks] == ["0", "1", "0", "1"]
    assert len({line["SLURMD_NODENAME"] for line in ranks}) == 2
    assert {line["SLURM_GPUS_ON_NODE"] for line in ranks} == {"2"}
    assert {line["NCCL_SOCKET_IFNAME"] for line in ranks} == {"lo"}
    assert {line["MASTER_ADDR"] for line in ranks} == {"127.0.0.1"}
    assert {line["SLURM_CPUS_PER_TASK"] for line in ranks} == {"2"}
    assert seen(folder, "actor-0", "started")[0]["SLURM_GPUS_ON_NODE"] == "2", (
        "tensor parallelism of an engine"
    )


def test_a_worker_that_dies_is_started_again(cluster: Cluster, shared: Path, program):
    steps = 80
    folder = send(write_recipe(shared, steps=steps), program, actors=1)
    wait_until(lambda: step_of(folder) > 0 and seen(folder, "actor-0"), "the run goes", 60)
    for who in ("actor-0", "learner", "broker"):
        os.kill(seen(folder, who)[-1]["pid"], signal.SIGKILL)
        wait_until(lambda who=who: len(seen(folder, who, "started")) == 2, f"{who} is back", 60)
    assert_whole(folder, steps)


def test_a_run_that_cannot_go_on_leaves_nothing_behind(cluster: Cluster, shared: Path, program):
    recipe = write_recipe(shared, steps=1000)
    folder = send(recipe, program, actors=2)
    wait_until(lambda: step_of(folder) > 0, "the run goes", 60)
    (shared / "questions.jsonl").unlink()  # the broker's next start is refused: exit code 2
    os.kill(seen(folder, "broker")[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: not queue.queued("slipstream-demo"), "the head job gives up", 90)
    wait_until(lambda: not queue.queued("slipstream-demo-actors"), "its actors are taken back", 60)
    assert "error: " in (folder / "broker.log").read_text()


def test_actors_do_not_outstay_their_head(cluster: Cluster, shared: Path, program, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_LOOK_S", "2")  # sbatch hands it on to the jobs
    folder = send(write_recipe(shared, steps=1000), program, actors=2)
    wait_until(lambda: step_of(folder) > 0 and actors_at_work() == [0, 1], "the run goes", 60)
    state = read_state(folder)
    head, array = state.head, state.arrays[0]
    cluster.ask("scontrol", "requeuehold", str(head))  # as in preemption on a full cluster

    def behind() -> list[str]:
        return cluster.ask("squeue", "--noheader", "--array", f"--jobs={array}", "--format=%T %E").split()

    wait_until(
        lambda: behind() == ["PENDING", f"after:{head}(unfulfilled)"] * 2, "actors queue behind it", 120
    )
    cluster.ask("scontrol", "release", str(head))
    for label in (f"{array}_0", f"{array}_1", str(head)):
        cluster.start_again(label)
    wait_until(lambda: len(seen(folder, "learner", "started")) == 2, "the learner is back", 90)
    wait_until(lambda: actors_at_work() == [0, 1], "its actors are back", 60)
    queue.cancel([str(head)])
    wait_until(lambda: not queue.queued("slipstream-demo-actors"), "the actors have left", 60)
    assert "the actor leaves" in (folder / "slurm" / "actor-0.log").read_text()


def test_a_cancelled_run_is_resumed(cluster: Cluster, shared: Path, program):
    steps = 60
    recipe = write_recipe(shared, steps=steps)
    folder = send(recipe, program, actors=1)
    wait_until(lambda: step_of(folder) > 0, "the run goes", 60)
    state = read_state(folder)
    queue.cancel(map(str, [state.head, *state.arrays]))
    wait_until(
        lambda: not queue.queued("slipstream-demo") + queue.queued("slipstream-demo-actors"),
        "all is gone",
        60,
    )
    saved = step_of(folder)
    assert final(folder) is None, "cancelled is not ended"
    send(recipe, program, resume=True, actors=2)
    assert read_state(folder).head != state.head
    assert_whole(folder, steps)
    assert saved < steps
