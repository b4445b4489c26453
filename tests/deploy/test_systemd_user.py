"""The units under a real systemd: ready, killed, hung, refused, stopped, continued to the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.recipe import Recipe, load_recipe
from common.recipe.load import REPOSITORY
from deploy.systemd.units import Host, Role, write_units
from tests.slurm.recipes import write_recipe

pytestmark = pytest.mark.slurm  # about a minute; `make test-slurm` runs what starts real launchers

HERE = Path(__file__).parent
PROGRAM = HERE.parent / "slurm" / "program.py"
STEPS = 250


def can_run_a_manager() -> bool:
    """Whether a systemd user instance can be had here: root, systemd, and the right to make namespaces."""
    if os.getuid() != 0 or not shutil.which("systemctl") or not Path("/sys/fs/cgroup/systemd").exists():
        return False
    done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return done.returncode == 0


def play(
    folder: Path, recipe: Recipe, host: Host, *mode: str, program: tuple[str, ...] | None = None
) -> dict:
    """Write units, play the scenario in a namespace of its own, return what it saw."""
    if not can_run_a_manager():
        pytest.skip(
            "no systemd user instance can be started here (needs root, systemd and its cgroup hierarchy)"
        )
    write_units(recipe, host, program=program)
    scenario = [
        sys.executable,
        str(HERE / "systemd_scenario.py"),
        str(recipe.folder),
        str(host.output),
        *mode,
    ]
    done = subprocess.run(
        [str(HERE / "user_manager.sh"), str(folder), *scenario], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Iterator[dict]:
    """What was seen of a run with scripted peers."""
    folder = tmp_path_factory.mktemp("systemd")
    with contextlib.chdir(folder):
        recipe = load_recipe(write_recipe(folder, steps=STEPS), [f'run.root="{folder / "runs"}"'])
        host = Host(roles=(Role.all,), actors=2, output=folder / "units", user_manager=True)
        yield play(folder, recipe, host, program=(sys.executable, str(PROGRAM)))


def test_all_workers_report_ready(facts):
    assert set(facts["started"].values()) == {"active"}


def test_a_killed_actor_comes_back_and_its_engine_does_not_stay(facts):
    assert facts["back_after_kill"]
    assert facts["engine_after_kill"] == []


def test_an_interrupted_broker_comes_back(facts):
    assert facts["back_after_interruption"]


def test_the_watchdog_ends_an_actor_without_progress_and_nobody_else(facts):
    assert facts["restarted_after_hang"]
    assert facts["untouched_meanwhile"] == "0"


def test_a_mistake_of_the_caller_is_not_tried_again(facts):
    assert (facts["ActiveState"], facts["NRestarts"], facts["ExecMainStatus"]) == ("failed", "0", "2")


def test_stop_is_orderly_and_leaves_no_process(facts):
    assert set(facts["stopped"].values()) == {"inactive"}
    assert facts["survivors"] == []
    assert facts["left_in_order"] == [True, True, True]


def test_the_run_continues_to_its_end_and_stays_ended(facts):
    assert set(facts["finished"].values()) == {"inactive"}
    assert facts["outcomes"] == ["finished"]
    assert facts["sum_ok"] == [True]
    assert facts["steps"] == STEPS
    assert facts["questions"] == 4 * STEPS


@pytest.mark.e2e
@pytest.mark.nightly
def test_the_real_workers_are_ready_watched_and_gone(tmp_path):
    with contextlib.chdir(REPOSITORY):  # where the recipe's model is
        changes = [f'run.root="{tmp_path}"', "eval.sets=[]", "tracking.enabled=false", 'launch.device="cpu"']
        recipe = load_recipe("demo", [*changes, "run.steps=10000"])
        host = Host(roles=(Role.all,), actors=1, output=tmp_path / "units", user_manager=True)
        seen = play(tmp_path, recipe, host, "demo")
    assert list(seen["started"].values()) == ["active"] * 3
    assert seen["restarts"] == ["0"] * 3, "healthy workers ping in time"
    assert seen["steps"] > 2
    assert set(seen["stopped"].values()) == {"inactive"}
    assert seen["checkpoints"] > 0, "the learner saves before it leaves"
    assert seen["survivors"] == [], "no engine process stays"
