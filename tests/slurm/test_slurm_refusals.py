"""Bad input against a real Slurm: one sentence, nothing written, nothing queued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from deploy.slurm import queue
from deploy.slurm.scale import scale_array
from deploy.slurm.state import read_state
from tests.slurm.cluster import Cluster
from tests.slurm.recipes import write_recipe
from tests.slurm.test_slurm_run import send

pytestmark = pytest.mark.slurm


def slipstream(*arguments: str) -> subprocess.CompletedProcess:
    """The command line, as a person runs it."""
    return subprocess.run(
        [sys.executable, "-m", "deploy", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_more_cores_than_a_node_has(cluster: Cluster, shared: Path):
    recipe = write_recipe(shared)
    recipe.write_text(recipe.read_text().replace('device = "cpu"', 'device = "gpu"'))
    done = slipstream("submit", str(recipe), "--gpus-per-node", "2")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    for words in ("sbatch refused: ", "head.sbatch asks for 16 cores of a node", "--cpus-per-gpu"):
        assert words in done.stderr
    assert not (shared / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--partition", "gpu"], "--partition: there is no partition 'gpu'; there are: main, small"),
        (
            ["--partition", "main", "--actor-partition", "spot"],
            "--actor-partition: there is no partition 'spot'",
        ),
        (["--partition", "small", "--learner-nodes", "4", "--set", "learner.ranks=4"], "sbatch refused: "),
        (["--partition", "main", "--time", "soon"], "--time: 'soon' is not a time limit"),
        (["--partition", "main; rm"], "--partition: 'main; rm' is not a name"),
        (
            ["--partition", "main", "--learner-nodes", "2"],
            "--learner-nodes: 2 nodes do not divide the 1 ranks",
        ),
        (["--partition", "main", "--gpus-per-node", "8"], "--gpus-per-node: 8 GPUs contradict"),
        (["--partition", "main", "--sbatch", "exclusive"], "--sbatch: 'exclusive' is not one option"),
    ],
)
def test_refused_in_one_sentence(cluster: Cluster, shared: Path, arguments, sentence):
    recipe = write_recipe(shared)
    done = slipstream("submit", str(recipe), *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert not (shared / "runs").exists()
    assert not queue.queued("slipstream-demo")


def test_two_runs_of_one_name_are_refused(cluster: Cluster, shared: Path, program):
    recipe = write_recipe(shared)
    folder = send(recipe, program, extra=("--hold",))
    state = read_state(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(
        UserError, match=f"run.name: a run with this name is already queued or running .job {state.head}"
    ):
        send(recipe, program)
    queue.cancel([str(state.head), *map(str, state.arrays)])
    with pytest.raises(UserError, match="already holds a run"):
        send(recipe, program)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_submission_that_fails_half_way_is_taken_back(cluster: Cluster, shared: Path, program, monkeypatch):
    real = queue.submit_file

    def refuse_actors(path: str, *options: str) -> int:
        if path.endswith("actors.sbatch"):
            raise UserError("sbatch refused: the array is too large.")
        return real(path, *options)

    monkeypatch.setattr(queue, "submit_file", refuse_actors)
    with pytest.raises(UserError, match="too large"):
        send(write_recipe(shared), program, extra=("--hold",))
    assert not (shared / "runs" / "demo").exists()
    assert not queue.queued("slipstream-demo")


def test_scaling_what_has_ended_is_refused(cluster: Cluster, shared: Path, program):
    folder = send(write_recipe(shared), program, extra=("--hold",))
    state = read_state(folder)
    queue.cancel([str(state.head), *map(str, state.arrays)])
    with pytest.raises(UserError, match=f"not on the cluster .job {state.head} has ended."):
        scale_array(folder, 5)


def test_waiting_actors_are_taken_out_of_the_queue(cluster: Cluster, shared: Path, program):
    folder = send(write_recipe(shared), program, actors=4, extra=("--hold",))
    state = read_state(folder)
    try:
        assert "3 taken out of the queue" in scale_array(folder, 1)
        assert [task.index for task in queue.queued("slipstream-demo-actors")] == [0]
        scale_array(folder, 3)
        assert sorted(task.index for task in queue.queued("slipstream-demo-actors")) == [0, 1, 2]
        assert len(json.loads((folder / "slurm" / "state.json").read_text())["arrays"]) == 2
    finally:
        queue.cancel(map(str, [state.head, *read_state(folder).arrays]))
