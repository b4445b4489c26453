"""Batch files as bash and Slurm read them; scaling as arithmetic on the queue."""

from __future__ import annotations

import errno
import fcntl
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from common import model_files
from common.errors import UserError
from common.recipe import load_recipe, resolved_toml
from deploy.slurm import queue
from deploy.slurm.plan import Options, cluster_overrides, make_plan, seconds_of
from deploy.slurm.queue import Task, array_ranges, call, default_limit, require_slurm
from deploy.slurm.scale import plan_change, scale_array
from deploy.slurm.scripts import render
from deploy.slurm.state import State, locked, write_state
from deploy.slurm.submit import resolve, submit_recipe
from tests.slurm.recipes import write_recipe

GPU = {"gpus_per_node": 8, "time": "1-00:00:00", "account": "lab", "qos": "high", "interface": "ib0"}


@pytest.fixture
def recipe_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def resolved(path: Path, options: Options, *overrides: str):
    """The recipe as `submit` resolves it."""
    loaded = load_recipe(path, overrides)
    return load_recipe(path, [*overrides, *cluster_overrides(loaded, options)])


def scripts_of(path: Path, *overrides: str, set_addresses: bool = True, **changes) -> dict[str, str]:
    """Rendered batch files."""
    options = Options(**{"learner_nodes": 1, "actors": 12, "partition": "p", **changes})
    return render(make_plan(resolved(path, options, *overrides), options), set_addresses=set_addresses)


def directives(script: str) -> list[str]:
    """Options of sbatch in a script."""
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


@pytest.mark.parametrize(
    "changes", [{}, GPU, {"learner_nodes": 1, "setup": "module load cuda\nulimit -n 4096"}]
)
def test_bash_accepts_the_scripts(recipe_file, changes):
    device = 'launch.device="gpu"' if changes.get("gpus_per_node") else 'launch.device="cpu"'
    for script in scripts_of(recipe_file, device, **changes).values():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "{{" not in script
        assert "{%" not in script
        body = script[script.index("\nrun=") :]
        assert "#SBATCH" not in body, "Slurm reads options only before the first command"


def test_gpu_plan_fills_the_nodes(recipe_file):
    options = Options(learner_nodes=4, actors=12, partition="a100", actor_partition="spot", **GPU)
    recipe = resolved(recipe_file, options, 'launch.device="gpu"', "actor.tensor_parallel=2")
    assert recipe.learner.ranks == 32
    assert recipe.actor.count == 12
    assert recipe.broker.keys == recipe.folder.resolve() / "keys"
    scripts = render(make_plan(recipe, options), set_addresses=True)
    head, actors = directives(scripts["head.sbatch"]), directives(scripts["actors.sbatch"])
    wanted = {
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=a100",
        "--signal=B:USR1@900",
        "--cpus-per-task=8",
    }
    assert wanted | {"--requeue", "--time=1-00:00:00", "--account=lab", "--qos=high"} <= set(head)
    wanted = {"--array=0-11", "--gpus-per-node=2", "--cpus-per-task=16", "--partition=spot", "--nodes=1"}
    assert wanted | {"--requeue", "--signal=B:USR1@120"} <= set(actors)
    assert "NCCL_SOCKET_IFNAME=ib0" in scripts["head.sbatch"]


def test_cores_are_the_callers(recipe_file):
    gpu = ('launch.device="gpu"',)
    asked = scripts_of(recipe_file, *gpu, gpus_per_node=4, cpus_per_gpu=12)["head.sbatch"]
    assert "--cpus-per-task=12" in directives(asked)
    by_hand = scripts_of(recipe_file, *gpu, gpus_per_node=4, head_extra=("--cpus-per-gpu=6",))
    assert [d for d in directives(by_hand["head.sbatch"]) if "cpus" in d] == ["--cpus-per-gpu=6"]
    assert "--cpus-per-task=8" in directives(by_hand["actors.sbatch"])
    with pytest.raises(UserError, match="--cpus-per-gpu: this recipe runs on the CPU"):
        scripts_of(recipe_file, cpus_per_gpu=12)


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"SLURM_CPUS_ON_NODE": "96"}, "12"),
        ({"SLURM_CPUS_PER_TASK": "7"}, "7"),
        ({"SLURM_CPUS_ON_NODE": "4"}, "1"),
    ],
)
def test_a_rank_gets_its_share_of_the_node(recipe_file, given, threads):
    script = scripts_of(recipe_file, 'launch.device="gpu"', gpus_per_node=8)["head.sbatch"]
    part = script[script.index("\nthreads=") : script.index("\nexport PYTHONUNBUFFERED")] + "\necho $threads"
    done = subprocess.run(["bash", "-c", part], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [threads]
    assert '--cpus-per-task="$threads"' in script


@pytest.mark.parametrize(
    ("since", "code", "verdict"), [(10, 1, "yes 4"), (490, 1, "no 0"), (10, 2, "no 0"), (10, 4, "no 0")]
)
def test_a_worker_that_has_lived_for_minutes_has_its_restarts_back(recipe_file, since, code, verdict):
    script = scripts_of(recipe_file, "launch.restarts=5")["head.sbatch"]
    part = script[script.index("\nleft=") : script.index("\ncode=0")]
    line = (
        f"{part}\nstopping=no left=0 SECONDS=500\ncurable {code} {since} && echo yes $left || echo no $left"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == verdict


def test_actors_of_whole_nodes(recipe_file):
    gpu = ('launch.device="gpu"', "actor.tensor_parallel=2")
    whole = {"gpus_per_node": 8, "actors": 12, "actors_per_job": 4}
    actors = scripts_of(recipe_file, *gpu, **whole)["actors.sbatch"]
    assert {"--array=0-2", "--gpus-per-node=8", "--cpus-per-task=64"} <= set(directives(actors))
    with pytest.raises(UserError, match="--actors: 10 is not a multiple of --actors-per-job 4"):
        scripts_of(recipe_file, actors=10, actors_per_job=4)


def test_scaling_counts_in_whole_jobs(tmp_path, slurm, monkeypatch):
    (tmp_path / "slurm").mkdir()
    write_state(tmp_path, State("demo", 7, options={"actors_per_job": 4}))
    running = [Task(7, None, "RUNNING")]
    monkeypatch.setattr(queue, "queued", lambda name: running if name == "slipstream-demo" else [])
    assert "jobs of 4 actors: 0 running" in scale_array(tmp_path, 8)
    assert slurm == [("actors.sbatch", "--dependency=after:7", "--array=0-1")]
    with pytest.raises(UserError, match="--actors: 6 is not a multiple of --actors-per-job 4"):
        scale_array(tmp_path, 6)


def test_each_kind_of_job_has_its_own_options(recipe_file):
    scripts = scripts_of(
        recipe_file,
        time="1-00:00:00",
        actor_time="04:00:00",
        qos="high",
        actor_qos="spot",
        extra=("--mail-type=NONE",),
        head_extra=("--exclusive",),
        actor_extra=("--mem=40G",),
    )
    head, actors = directives(scripts["head.sbatch"]), directives(scripts["actors.sbatch"])
    assert {"--time=1-00:00:00", "--qos=high", "--mail-type=NONE", "--exclusive"} <= set(head)
    assert {"--time=04:00:00", "--qos=spot", "--mail-type=NONE", "--mem=40G"} <= set(actors)
    assert not {"--mem=40G", "--qos=spot"} & set(head)
    assert not {"--exclusive", "--qos=high"} & set(actors)


@pytest.mark.parametrize(
    ("changes", "lead"),
    [
        ({}, 900),
        ({"time": "1-00:00:00"}, 900),
        ({"time": "10:00"}, 150),
        ({"time": "1-00:00:00", "lead": 1800}, 1800),
    ],
)
def test_a_job_hears_of_its_limit_in_time(recipe_file, changes, lead):
    script = scripts_of(recipe_file, **changes)["head.sbatch"]
    assert [d for d in directives(script) if d.startswith("--signal")] == [f"--signal=B:USR1@{lead}"]
    assert f"SECONDS + {lead - 30}" in script, "back in the queue half a minute before the limit"


def test_a_lead_that_cannot_be_is_refused(recipe_file):
    with pytest.raises(UserError, match="--lead: 600 s are not less than the time limit, 10:00"):
        scripts_of(recipe_file, time="10:00", lead=600)
    with pytest.raises(UserError, match="--sbatch: the scripts need their own --signal: use --lead"):
        scripts_of(recipe_file, extra=("--signal=B:USR1@900",))
    for line in ("--time=1-00", "--time 60", "-t60"):
        with pytest.raises(UserError, match="--head-sbatch: .* goes by --time and --actor-time"):
            scripts_of(recipe_file, head_extra=(line,))
    scripts_of(recipe_file, extra=("--time-min=60",))


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("10:30", 630),
        ("1:00:05", 3605),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-0:0:9", 86409),
    ],
)
def test_time_limits_as_slurm_writes_them(limit, seconds):
    assert seconds_of(limit) == seconds


def test_the_shortest_default_limit_counts(monkeypatch):
    lines = "main*|1:00:00|infinite\nlong|n/a|2-00:00:00\nopen|n/a|infinite\n"
    asked: list[tuple[str, ...]] = []

    def answer(*arguments: str) -> str:
        asked.append(arguments)
        return lines

    monkeypatch.setattr(queue, "call", answer)
    assert default_limit(None) == "1:00:00", "the cluster's default partition"
    assert default_limit("long,open,main") == "1:00:00"
    assert "--partition=long,open,main" in asked[-1]
    lines = "open|n/a|infinite\n"
    assert default_limit("open") is None


def test_a_run_that_is_sent_again_keeps_what_it_had(recipe_file, slurm):
    given = {"partition": "p", "actors": 3, "interface": "ib0", "setup": "true", "extra": ["--mem=0"]}
    recipe, options = resolve(str(recipe_file), ["run.steps=7"], given, resume=False)
    submit_recipe(recipe, options)
    # What the broker of the first job leaves in the run folder: its node's addresses.
    own = recipe.folder / "recipe.toml"
    bound = load_recipe(own, ['broker.bind="10.0.0.7"', 'weights.bind="10.0.0.7"'])
    own.write_text(resolved_toml(bound))
    again, kept = resolve(str(own), [], {"actors": 5, "extra": []}, resume=True)
    assert kept == replace(options, actors=5)
    submit_recipe(again, kept, resume=True)
    script = (recipe.folder / "slurm" / "head.sbatch").read_text()
    assert "broker.bind='$address'" in script, "the next job has another node"
    moved, _ = resolve(str(own), ['broker.bind="10.0.0.8"'], {}, resume=True)
    assert moved.broker.bind == "10.0.0.8", "what is typed goes before what is known"


def test_a_cluster_survives_a_lost_node(recipe_file):
    options = Options(learner_nodes=1, actors=2)
    assert resolved(recipe_file, options).broker.fsync
    assert not resolved(recipe_file, options, "broker.fsync=false").broker.fsync


def test_an_address_in_the_recipe_is_kept(recipe_file):
    assert "broker.bind" in scripts_of(recipe_file)["head.sbatch"]
    assert "broker.bind" not in scripts_of(recipe_file, set_addresses=False)["head.sbatch"]


def test_odd_paths_stay_words(tmp_path, monkeypatch):
    folder = tmp_path / "a b;$(touch x)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = scripts_of(write_recipe(folder))["head.sbatch"]
    echo = script[script.index("\nrun=") : script.index("\nslipstream=")] + '\nprintf %s "$run"'
    done = subprocess.run(["bash", "-c", echo], capture_output=True, text=True, check=True)
    assert done.stdout == str(folder / "runs" / "demo")
    assert not (folder / "x").exists()


def test_dry_run_only_writes(recipe_file, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    options = Options(learner_nodes=1, actors=2, partition="p")
    recipe = resolved(recipe_file, options)
    submit_recipe(recipe, options, dry_run=True)
    written = sorted(path.name for path in (recipe.folder / "slurm").iterdir())
    assert written == ["actors.sbatch", "head.sbatch"]
    assert list((recipe.folder / "keys").glob("*.key_secret"))
    assert "nothing was submitted" in capsys.readouterr().out


def test_a_rehearsal_may_be_repeated_but_a_run_is_never_overwritten(recipe_file):
    options = Options(learner_nodes=1, actors=2, partition="p")
    recipe = resolved(recipe_file, options)
    submit_recipe(recipe, options, dry_run=True)
    again = Options(learner_nodes=1, actors=3)
    submit_recipe(resolved(recipe_file, again), again, dry_run=True)
    script = (recipe.folder / "slurm" / "actors.sbatch").read_text()
    assert "--array=0-2" in script
    assert "--partition" not in script, "the cluster's default"
    (recipe.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="already holds a run"):
        submit_recipe(recipe, options, dry_run=True)


def test_the_paper_can_be_rehearsed_far_from_the_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    options = Options(learner_nodes=1, actors=12)
    submit_recipe(resolved(Path("paper-7b"), options), options, dry_run=True)
    assert "--array=0-11" in (tmp_path / "runs" / "paper-7b" / "slurm" / "actors.sbatch").read_text()


@pytest.fixture
def slurm(monkeypatch) -> list[tuple[str, ...]]:
    """A Slurm that takes everything; the batch files that were sent, with their options."""
    sent: list[tuple[str, ...]] = []

    def submit_file(path: str, *options: str) -> int:
        sent.append((Path(path).name, *options))
        return 40 + len(sent)

    for name in ("require_slurm", "require_partition", "try_script", "default_limit"):
        monkeypatch.setattr(queue, name, lambda *_, **__: None)
    monkeypatch.setattr(queue, "queued", lambda _: [])
    monkeypatch.setattr(queue, "submit_file", submit_file)
    return sent


def test_a_login_nodes_memory_does_not_count(recipe_file, slurm, capsys):
    options = Options(learner_nodes=1, actors=2, partition="p")
    recipe = resolved(recipe_file, options, "actor.kv_cache_mb=1000000000")
    submit_recipe(recipe, options)
    assert f"slipstream actor --join HOST:PORT --keys {recipe.broker.keys}" in capsys.readouterr().out
    assert slurm == [("head.sbatch",), ("actors.sbatch", "--dependency=after:41")]


def test_weights_that_nodes_would_have_to_fetch_are_asked_for_first(recipe_file, slurm, monkeypatch):
    monkeypatch.setattr(model_files, "model_folder", lambda _: Path("model"))  # its small files are here
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "no-cache")
    options = Options(learner_nodes=1, actors=2)
    with pytest.raises(UserError, match="model.path: the weights of .* `hf download lab/model`"):
        submit_recipe(resolved(recipe_file, options, "model.path='lab/model'"), options)
    assert not slurm
    assert not Path("runs").exists()


def test_without_slurm_nothing_is_written(recipe_file, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    options = Options(learner_nodes=1, actors=2, partition="p")
    with pytest.raises(UserError, match="sbatch and squeue and scancel and sinfo not found"):
        submit_recipe(resolved(recipe_file, options), options)
    assert not Path("runs").exists()
    with pytest.raises(UserError, match="login node"):
        require_slurm()
    with pytest.raises(UserError, match="sbatch not found"):
        call("sbatch")


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    (tmp_path / "slurm").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match="does not lock files .flock: Function not implemented"),
        locked(tmp_path),
    ):
        pass


@given(st.sets(st.integers(0, 1000)))
def test_array_ranges_say_exactly_the_indices(indices):
    said: list[int] = []
    for part in filter(None, array_ranges(indices).split(",")):
        first, _, last = part.partition("-")
        said += range(int(first), int(last or first) + 1)
    assert said == sorted(indices)


entries_of_the_queue = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["PENDING", "RUNNING"]), st.booleans()),
    unique_by=lambda entry: entry[0],
    max_size=20,
)


@given(entries_of_the_queue, st.integers(0, 40))
def test_scaling_reaches_what_is_wanted(entries, wanted):
    tasks = [Task(7, index, state) for index, state, _ in entries]
    leaving = {Task(7, index, state).label for index, state, goes in entries if goes and state == "RUNNING"}
    change = plan_change(tasks, leaving, wanted)
    staying = {task for task in tasks if task.label not in leaving}
    going = {*change.cancel, *change.ask}
    assert len(staying - going) + len(change.add) == wanted
    assert going <= staying, "who was asked before is not asked again"
    assert not set(change.add) & {task.index for task in tasks}, "an index is an actor's name"
    assert not (change.add and going)
    assert all(task.state == "PENDING" for task in change.cancel)
    if any(task.state == "PENDING" for task in staying - going):
        assert not change.ask, "waiting tasks go before working ones"


@pytest.mark.parametrize("user", ["0", "1000"])
def test_where_slurm_cannot_be_installed_its_tests_are_skipped_with_a_word(tmp_path: Path, user: str) -> None:
    """Neither apt-get nor Slurm, root or not: `make test-slurm` goes on, and says why nothing is tested."""
    for name, script in (("id", f"echo {user}"), ("bash", 'exec /bin/bash "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    install = Path(__file__).resolve().parents[1] / "slurm" / "install.sh"
    done = subprocess.run(
        ["/bin/bash", str(install)], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "tests that need them are skipped" in done.stderr


# --- the verb ---------------------------------------------------------------------------------------------------


def test_every_option_of_the_verb_is_one_of_the_plans(recipe_file, monkeypatch):
    from deploy import cli
    from deploy.slurm import submit

    asked = []
    monkeypatch.setattr(submit, "submit_recipe", lambda _, options, **how: asked.append((options, how)))
    names = (
        "partition",
        "actor_partition",
        "time",
        "actor_time",
        "account",
        "qos",
        "actor_qos",
        "interface",
        "setup",
    )
    words = {name: str(number) for number, name in enumerate(names, 10)}
    numbers = {"actors": 6, "actors_per_job": 3, "lead": 60, "learner_nodes": 1, "gpus_per_node": 0}
    lines = {"sbatch": "--mem=1", "head-sbatch": "--mem=2", "actor-sbatch": "--mem=3"}
    given = {**words, **numbers, **lines, "cpus_per_gpu": 4}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit):
        cli.main(["submit", str(recipe_file), *options, "--dry-run"])
    kinds = {"extra": ("--mem=1",), "head_extra": ("--mem=2",), "actor_extra": ("--mem=3",)}
    assert asked == [
        (
            Options(**words, **numbers, **kinds, cpus_per_gpu=4),
            {"resume": False, "fresh": False, "dry_run": True},
        )
    ]


def test_that_no_memory_is_asked_for_is_said(recipe_file, capsys):
    for extra, said in (((), 1), (("--mem-per-gpu=60G",), 0)):
        options = Options(1, 2, extra=extra)
        submit_recipe(resolved(recipe_file, options), options, dry_run=True)
        assert capsys.readouterr().out.count("no memory is asked for") == said
