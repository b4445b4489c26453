"""What the batch files do when workers end, the time limit nears, or the other job is gone: run by bash, with stand-ins
for Slurm's commands and for `slipstream` (tests/slurm runs them under a real Slurm).

A stand-in writes its arguments to `calls`; what it does besides is a shell fragment of the test.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from common.recipe import load_recipe
from deploy.slurm.plan import Options, cluster_overrides, make_plan
from deploy.slurm.scripts import render
from tests.slurm.recipes import write_recipe

COMMANDS = ("srun", "scancel", "squeue", "scontrol", "ip")


class Stage:
    """A folder with a run, its batch files, and stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.recipe = write_recipe(folder)
        self.run_folder = folder / "runs" / "demo"
        self.run_folder.mkdir(parents=True)
        self.bin.mkdir()
        for name in COMMANDS:
            self.stand_in(name)
        self.stand_in("sleep", "exec /bin/sleep 0.02", noted=False)
        self.program = self.stand_in("program")

    def stand_in(self, name: str, body: str = "exit 0", *, noted: bool = True) -> Path:
        """Make a command; `$1` and so on are its arguments."""
        path = self.bin / name
        note = f'echo "{name} $*" >>{shlex.quote(str(self.folder / "calls"))}\n' if noted else ""
        path.write_text(f"#!/bin/bash\n{note}{body}\n")
        path.chmod(0o755)
        return path

    def play(self, script: str, *overrides: str, **changes) -> subprocess.CompletedProcess[str]:
        """Run a batch file to its end."""
        options = Options(**{"learner_nodes": 1, "actors": 2, **changes})
        loaded = load_recipe(self.recipe, overrides)
        recipe = load_recipe(self.recipe, [*overrides, *cluster_overrides(loaded, options)])
        plan = make_plan(recipe, options, program=(str(self.program),))
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_ARRAY_JOB_ID": "78",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLIPSTREAM_LOOK_S": "1",
            "SLIPSTREAM_MISSED_S": "0",
            "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        }
        return subprocess.run(
            ["bash", "-c", render(plan, set_addresses=True)[script]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, name: str) -> list[str]:
        """Arguments of every call of a stand-in."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    return Stage(tmp_path)


STUBBORN = "trap '' TERM; while [ ! -e requeued ]; do sleep; done"  # until Slurm ends it
BROKER = "trap 'exit 0' TERM; while :; do sleep; done"  # until it is told to leave


# --- broker and learner ------------------------------------------------------------------------------------


def test_the_code_of_the_rank_that_failed_counts_and_not_that_of_its_victims(stage: Stage) -> None:
    stage.stand_in("program", BROKER)
    stage.stand_in("srun", "echo 4 >runs/demo/learner.exit; exit 143")
    done = stage.play("head.sbatch")
    assert done.returncode == 4
    assert len(stage.calls("srun")) == 1, "no restart cures it"
    assert any("--name=slipstream-demo-actors" in call for call in stage.calls("scancel"))


def test_nccl_takes_another_jobs_gpus_on_the_same_node_for_another_host(stage: Stage) -> None:
    stage.stand_in("hostname", "echo node-1", noted=False)
    stage.stand_in("program", BROKER)
    # What srun starts: a shell for each rank, on its own node.
    ranks = 'while [ "$1" != bash ]; do shift; done; bash -c "$3" rank env | grep NCCL_HOSTID >head; exit 2'
    stage.stand_in("srun", ranks)
    stage.play("head.sbatch")
    assert (stage.folder / "head").read_text() == "NCCL_HOSTID=node-1-77\n"
    stage.stand_in("squeue", "echo 77")
    stage.stand_in("program", "env | grep NCCL_HOSTID >actor")
    stage.play("actors.sbatch")
    assert (stage.folder / "actor").read_text() == "NCCL_HOSTID=node-1-77\n"


def test_a_learner_that_was_killed_is_started_again(stage: Stage) -> None:
    stage.stand_in("program", BROKER)
    (stage.run_folder / "learner.exit").write_text("2\n")  # of an earlier start
    stage.stand_in("srun", "exit 137")
    done = stage.play("head.sbatch")
    assert done.returncode == 137
    assert len(stage.calls("srun")) == 1 + load_recipe(stage.recipe).launch.restarts


def test_a_learner_that_left_while_the_run_goes_on_is_started_again(stage: Stage) -> None:
    """`scancel --signal=TERM JOB` reaches the learner alone, which leaves with exit code 0."""
    stage.stand_in("program", "while [ ! -e over ]; do sleep; done; exit 0")
    stage.stand_in("srun", "[ ! -e left ] || { touch over; exit 0; }; touch left; exit 0")
    done = stage.play("head.sbatch")
    assert done.returncode == 0
    assert len(stage.calls("srun")) == 2
    assert "the learner has left in order, but the run goes on" in done.stdout


def test_an_interrupted_broker_is_started_again_and_nobody_is_sent_away(stage: Stage) -> None:
    stage.stand_in("program", "[ ! -e interrupted ] && { touch interrupted; exit 3; }; exit 0")
    stage.stand_in("srun", "while [ ! -e interrupted ]; do sleep; done; exit 0")
    done = stage.play("head.sbatch")
    assert done.returncode == 0
    assert len(stage.calls("program")) == 2
    assert "the broker ended with exit code 3: starting it again" in done.stdout


def test_the_broker_of_a_learner_that_failed_is_not_started_again(stage: Stage) -> None:
    stage.stand_in("program", "trap 'exit 3' TERM; while :; do sleep; done")
    stage.stand_in("srun", "exit 4")
    assert stage.play("head.sbatch").returncode == 4
    assert len(stage.calls("program")) == 1


def test_at_the_deadline_the_job_queues_again_though_the_learner_still_writes(stage: Stage) -> None:
    stage.stand_in("program", BROKER)
    stage.stand_in("program", "while [ ! -e requeued ]; do sleep; done")
    stage.stand_in("srun", "kill -USR1 $PPID; " + STUBBORN)
    stage.stand_in("scontrol", "touch requeued")
    done = stage.play("head.sbatch", lead=4)
    assert stage.calls("scontrol") == ["requeue 77"]
    assert "the learner did not save its work in time" in done.stdout
    assert stage.calls("scancel") == ["--signal=TERM 77"], "actors stay: the run goes on"


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"setup": "false"}, "error: the commands of --setup ended with exit code 1"),
    ({"interface": "ib9"}, "for interface ib9"),
])  # fmt: skip
def test_a_head_that_cannot_start_takes_its_actors_back(stage: Stage, changes, sentence) -> None:
    done = stage.play("head.sbatch", **changes)
    assert done.returncode == 2
    assert sentence in done.stdout
    assert any("--name=slipstream-demo-actors" in call for call in stage.calls("scancel"))
    assert not stage.calls("srun")


def test_the_address_is_the_one_that_leads_away(stage: Stage) -> None:
    stage.stand_in("ip", "echo '192.0.2.1 via 10.1.0.1 dev eth1 src 10.1.2.3 uid 0'")
    stage.stand_in("hostname", "echo 172.17.0.1 10.1.2.3")
    stage.play("head.sbatch")
    assert "broker.bind='10.1.2.3'" in stage.calls("program")[0]
    stage.stand_in("ip", "exit 2")
    (stage.folder / "calls").unlink()
    stage.play("head.sbatch")
    assert "broker.bind='172.17.0.1'" in stage.calls("program")[0]


# --- actors ------------------------------------------------------------------------------------------------


def test_an_actor_leaves_when_its_head_is_gone(stage: Stage) -> None:
    stage.stand_in("squeue", "[ -e started ] || echo 77")  # there at first
    stage.stand_in("program", "touch started; " + BROKER)
    done = stage.play("actors.sbatch")
    assert done.returncode == 0
    assert "job slipstream-demo is not in the queue any more: the actor leaves" in done.stdout
    assert len(stage.calls("program")) == 1
    assert not stage.calls("scontrol"), "it does not queue again"


def test_an_actor_whose_head_waits_in_the_queue_again_queues_behind_it(stage: Stage) -> None:
    """Nobody knows how long the head will wait; until then its actors would hold GPUs for nothing."""
    stage.stand_in("squeue", "[ -e started ] && echo '77 PENDING' || echo '77 RUNNING'")
    stage.stand_in("program", "touch started; " + BROKER)
    done = stage.play("actors.sbatch")
    assert "job slipstream-demo waits in the queue again: the actor queues behind it" in done.stdout
    assert stage.calls("scontrol") == ["requeue 78_3", "update JobId=78_3 Dependency=after:77"]
    assert len(stage.calls("program")) == 1


def test_a_head_that_is_about_to_start_keeps_its_actors(stage: Stage) -> None:
    """It waits at one look, and runs at the next."""
    stage.stand_in(
        "squeue",
        "echo x >>looks; case $(wc -l <looks) in 1) echo '77 RUNNING' ;; [246]) echo '77 PENDING' ;; "
        "[35]) echo '77 RUNNING' ;; esac",
    )
    stage.stand_in("program", BROKER)
    done = stage.play("actors.sbatch")
    assert "is not in the queue any more" in done.stdout, "at the seventh look"
    assert not stage.calls("scontrol")


def test_an_actor_whose_head_is_gone_does_not_even_start(stage: Stage) -> None:
    assert stage.play("actors.sbatch").returncode == 0
    assert not stage.calls("program")


def test_a_slurm_that_does_not_answer_says_nothing_about_the_head(stage: Stage) -> None:
    stage.stand_in("squeue", "exit 1")
    assert stage.play("actors.sbatch").returncode == 0
    assert stage.calls("program") == [f"actor --run {stage.run_folder} --name actor-3"]


def test_near_its_limit_an_actor_that_does_not_leave_queues_again(stage: Stage) -> None:
    stage.stand_in("squeue", "echo 77")
    stage.stand_in("program", 'kill -USR1 "$(ps -o ppid= -p $PPID)"; ' + STUBBORN)  # the batch script itself
    stage.stand_in("scontrol", "touch requeued")
    stage.play("actors.sbatch", time="0:16")  # a lead of 4 s, and half of it for the actor
    assert stage.calls("scontrol") == ["requeue 78_3"]


def test_actors_share_a_job_and_its_gpus(stage: Stage) -> None:
    stage.stand_in("squeue", "[ -e left ] || echo 77")
    stage.stand_in(
        "program",
        'echo "$CUDA_VISIBLE_DEVICES $*" >>at-work; [ $(wc -l <at-work) -lt 2 ] || touch left; ' + BROKER,
    )
    gpu = ('launch.device="gpu"', "actor.tensor_parallel=2")
    done = stage.play("actors.sbatch", *gpu, actors=8, actors_per_job=2, gpus_per_node=8)
    assert done.returncode == 0, done.stderr
    lines = sorted((stage.folder / "at-work").read_text().splitlines())
    assert lines == [
        f"4,5 actor --run {stage.run_folder} --name actor-6",
        f"6,7 actor --run {stage.run_folder} --name actor-7",
    ]


def test_an_actor_that_dies_is_started_again_and_its_neighbour_works_on(stage: Stage) -> None:
    stage.stand_in("squeue", "[ -e left ] || echo 77")
    first = 'case "$*" in *actor-6) [ -e died ] && touch left || { touch died; kill -KILL $$; } ;; esac; '
    stage.stand_in("program", first + BROKER)
    done = stage.play("actors.sbatch", actors=8, actors_per_job=2)
    assert done.returncode == 0, done.stderr
    names = sorted(call.split()[-1] for call in stage.calls("program"))
    assert names == ["actor-6", "actor-6", "actor-7"]
    assert "the actor ended with exit code 137: starting it again" in done.stdout


def test_a_mistake_of_the_caller_is_the_jobs_exit_code(stage: Stage) -> None:
    stage.stand_in("squeue", "echo 77")
    stage.stand_in("program", "exit 2")
    assert stage.play("actors.sbatch").returncode == 2
    assert len(stage.calls("program")) == 1
