"""What a user gets wrong is one sentence that names the setting, exit code 2, and nothing is started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.keys import make_keys
from tests.scripted.ports import reserved_port

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = str(REPOSITORY / "models" / "minimath-base")


def slipstream(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'[model]\npath = "{BASE}"\ndtype = "float32"\nmax_context = 256\n'
        '[data]\ntrain = "demo-train"\n[rollout]\nmax_tokens = 64\n'
        "[batch]\nquestions_per_step = 4\noptimizer_steps = 1\n"
    )
    return path


def refused(recipe: Path, *settings: str) -> str:
    options = [part for setting in settings for part in ("--set", setting)]
    done = slipstream("run", str(recipe), *options, cwd=recipe.parent)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert not (recipe.parent / "runs").exists(), "nothing may be started or written"
    return lines[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["learner.lrr=1"], ["learner.lrr", "lr"]),
        (["model.path='no/such/folder'"], ["model.path", "no/such/folder"]),
        (["model.max_context=99999"], ["model.max_context", "1024"]),
        (["rollout.max_tokens=300"], ["rollout.max_tokens", "model.max_context"]),
        (["rollout.top_p=0.95"], ["top_p"]),
        (["rollout.group_size=1"], ["rollout.group_size"]),
        (["data.train='no-such-set'"], ["data.train", "no-such-set", "orz-mini"]),
        (["data.template='r2'"], ["r2", "qwen_math"]),
        (["data.reward='nowhere:f'"], ["data.reward", "nowhere"]),
        (["data.reward='maths'"], ["data.reward", "package.module:function"]),
        (["eval.sets=['none-such']"], ["eval.sets", "none-such"]),
        (["batch.questions_per_step=1000000"], ["data.train", "batch.questions_per_step"]),
        (["broker.bind='10.0.0.1'"], ["broker.bind", "broker.keys"]),
        (["broker.bind='0.0.0.0'"], ["broker.bind: name the one address"]),
        (["broker.bind='10.0.0.1'", "broker.keys='keys'"], ["weights.bind: '127.0.0.1' is unreachable"]),
        (["actor.tensor_parallel=3"], ["actor.tensor_parallel", "3"]),
        (["tracking.uri='localhost:5000'"], ["tracking.uri", "http://localhost:5000"]),
    ],
)
def test_setting_is_named(recipe: Path, settings: list[str], words: list[str]) -> None:
    line = refused(recipe, *settings)
    for word in words:
        assert word in line


def test_question_set_without_the_named_fields(recipe: Path) -> None:
    questions = recipe.parent / "questions.jsonl"
    questions.write_text(json.dumps({"q": "1+1", "answer": "2"}) + "\n")
    line = refused(recipe, f"data.train='{questions}'")
    assert "problem" in line
    assert "q, answer" in line


def test_port_in_use(recipe: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"broker.port: port {port}" in refused(recipe, f"broker.port={port}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda keys: (keys / "server.key_secret").chmod(0o644), "can be read by others: chmod 600"),
        (lambda keys: (keys / "server.key_secret").unlink(), "server.key_secret' does not exist"),
        (lambda keys: (keys / "server.key_secret").write_text("no key"), "cannot be read as a key"),
    ],
)
def test_keys_that_are_no_secret_or_no_keys(
    recipe: Path, spoil: Callable[[Path], object], words: str
) -> None:
    keys = recipe.parent / "keys"
    make_keys(keys)
    spoil(keys)
    assert words in refused(recipe, f"broker.keys='{keys}'")
    done = slipstream("broker", str(recipe), "--set", f"broker.keys='{keys}'", cwd=recipe.parent)
    assert (done.returncode, words in done.stderr, done.stderr.count("error: ")) == (2, True, 1)
    assert not (recipe.parent / "runs").exists()


def test_keys_of_the_workers_beside_the_broker(recipe: Path) -> None:
    keys = recipe.parent / "keys"
    make_keys(keys)
    (keys / "client.key_secret").unlink()
    assert "client.key_secret' does not exist" in refused(recipe, f"broker.keys='{keys}'")


def test_nobody_listens_where_an_actor_is_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits, however long, and says again and again for whom and what may be wrong."""
    import actors.main

    connect, tries = actors.main.Client.connect, 0

    def counted(client, timeout_s):
        nonlocal tries
        tries += 1
        if tries > 2:
            raise KeyboardInterrupt
        return connect(client, timeout_s)

    monkeypatch.setattr(actors.main, "NOTICE_S", 0.2)
    monkeypatch.setattr(actors.main.Client, "connect", counted)
    with pytest.raises(KeyboardInterrupt):
        actors.main.run_actor("127.0.0.1:9")
    assert len(caplog.messages) == 2
    for words in (
        "no answer from the broker at tcp://127.0.0.1:9",
        "is the port open",
        "keys",
        "still trying",
    ):
        assert words in caplog.messages[-1]


def test_sbatch_is_absent(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = slipstream("submit", str(recipe), "--actors", "2", cwd=recipe.parent)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "sbatch and squeue and scancel and sinfo not found" in done.stderr
    assert not (recipe.parent / "runs").exists()


def test_no_space_left(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.recipe import load_recipe
    from deploy import preflight

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    loaded = load_recipe(recipe)
    with pytest.raises(UserError, match=r"run\.root.*MiB free"):
        preflight.check_disk(loaded, preflight.check_model(loaded))


def test_folder_that_cannot_be_written(recipe: Path) -> None:
    file = recipe.parent / "file"
    file.write_text("x")
    line = refused(recipe, f"run.root='{file}/runs'")
    assert "run.root" in line


def test_second_run_in_the_same_folder(recipe: Path) -> None:
    folder = recipe.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.read_text())
    done = slipstream("run", str(recipe), cwd=recipe.parent)
    assert done.returncode == 2
    assert "run.name" in done.stderr
    assert "--resume" in done.stderr


def test_resume_without_a_run(recipe: Path) -> None:
    done = slipstream("run", str(recipe), "--resume", cwd=recipe.parent)
    assert (done.returncode, "run.name" in done.stderr) == (2, True)


def test_status_without_a_run(tmp_path: Path) -> None:
    done = slipstream("status", cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True)


def test_status_where_nobody_answers(tmp_path: Path) -> None:
    done = slipstream("status", "--join", "127.0.0.1:9", cwd=tmp_path)
    assert (done.returncode, "--join" in done.stderr) == (2, True)


def test_check_prints_the_plan(recipe: Path) -> None:
    done = slipstream("check", str(recipe), "--set", "batch.max_staleness=3", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    for words in (
        "4 questions x 8 responses = 32",
        "at most 3 versions, 16 groups",
        "626,304 parameters",
        "memory",
    ):
        assert words in done.stdout
    assert not (recipe.parent / "runs").exists()


RECIPES = sorted((REPOSITORY / "recipes").glob("*.toml"))
OF_PRETRAINING = ("pretrain", "zoo")
PRETRAINING = [path for path in RECIPES if path.stem.startswith(OF_PRETRAINING)]


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in PRETRAINING], ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    from common.recipe import load_recipe
    from common.tasks.templates import get_template

    loaded = load_recipe(path)
    get_template(loaded.data.template)
    if path.stem.startswith(("paper", "fig8", "duet")):
        batch = loaded.batch
        assert (loaded.rollout.group_size, batch.questions_per_step, batch.optimizer_steps) == (8, 128, 8)
        assert (loaded.learner.lr, loaded.rollout.max_tokens, loaded.algorithm.kl_beta) == (1e-6, 3000, 0.0)
        assert loaded.eval.sets == ("aime", "amc", "math500", "minerva", "olympiad_bench")


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: p.stem)
def test_every_pretraining_recipe_loads(path: Path) -> None:
    from learner.pretrain import load_pretrain_recipe

    assert load_pretrain_recipe(path).mixture


def test_every_verb_has_help_that_teaches(tmp_path: Path) -> None:
    from deploy.cli import VERBS

    listing = slipstream("--help", cwd=tmp_path).stdout
    for verb in VERBS:
        assert verb in listing
        done = slipstream(verb, "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["weights.route='nccl'", "launch.device='cpu'"], "weights.route: 'nccl' needs the learner on a GPU"),
        (["algorithm.loss='reinforce'", "algorithm.dual_clip=3"], "algorithm.dual_clip: has no effect with"),
        (["broker.keys='nokeys'"], "broker.keys: 'nokeys/server.key_secret' does not exist"),
        (["broker.port=PORT", "weights.port=PORT"], "weights.port: port PORT on 127.0.0.1 is broker.port's"),
        (["tracking.uri='localhost:5000'"], "tracking.uri: 'localhost:5000' begins with none of"),
        (["launch.device='cpu'", "launch.actor_cores=4096"], "launch.actor_cores: "),
    ],
)
def test_check_refuses_what_run_would(recipe: Path, settings: list[str], words: str) -> None:
    with reserved_port() as port:  # one that nobody serves
        settings, words = [s.replace("PORT", str(port)) for s in settings], words.replace("PORT", str(port))
        assert words in refused(recipe, *settings)
        options = [part for setting in settings for part in ("--set", setting)]
        done = slipstream("check", str(recipe), *options, cwd=recipe.parent)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_reward_whose_module_fails_in_its_own_way(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.parent / "broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(recipe.parent))
    from common.recipe import load_recipe
    from deploy import preflight

    loaded = load_recipe(recipe, ["data.reward='broken_reward:f'"])
    with pytest.raises(UserError, match=r"^data\.reward: cannot load .*ZeroDivisionError"):
        preflight.check_reward(loaded)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_gold_answers_that_are_never_right_are_noted_and_not_refused(recipe: Path, verb: str) -> None:
    questions = recipe.parent / "questions.jsonl"
    rows = [{"problem": f"{n}+1", "answer": "" if n == 3 else f"we add #### {n + 1}"} for n in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # `run` is refused for something that is looked at later: nothing is started
    late = ["--set", 'data.train="questions.jsonl"', *(["--resume"] if verb == "run" else [])]
    done = slipstream(verb, str(recipe), *late, cwd=recipe.parent)
    said = " ".join((done.stdout + done.stderr).split())
    assert "1 of 8 gold answers are empty" in said
    assert "7 of 8 gold answers contain '####'" in said
    assert done.returncode == (0 if verb == "check" else 2)
