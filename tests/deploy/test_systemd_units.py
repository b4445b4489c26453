"""Units as systemd itself reads them: verified, scored, and quoted so that odd paths stay words."""

from __future__ import annotations

import getpass
import pwd
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import load_recipe
from deploy.launch import machine
from deploy.systemd.units import Host, Role, escaped, quoted, write_units
from tests.slurm.recipes import write_recipe

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
MOST_EXPOSURE = 4.0


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose paths hold a space and a per cent sign."""
    folder = tmp_path / "50% of it"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return load_recipe(write_recipe(folder), [f'run.root="{folder / "runs"}"'])


def written(recipe, *roles: Role, **changes) -> Path:
    """Write units; returns their folder."""
    output = recipe.run.root.parent / "units"
    write_units(recipe, Host(roles=roles, output=output, **{"actors": 2, **changes}))
    return output


def settings(path: Path, key: str) -> list[str]:
    """Values of a key in a unit file, in order."""
    return re.findall(rf"^{key}=(.*)$", path.read_text(), re.MULTILINE)


@needs_analyze
@pytest.mark.parametrize("user_manager", [False, True])
@pytest.mark.parametrize("role", list(Role))
def test_systemd_accepts_every_unit(recipe, role, user_manager, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    output = written(recipe, role, user_manager=user_manager)
    files = sorted(map(str, [*output.glob("*.service"), *output.glob("*.target")]))
    assert len(files) == (4 if role is Role.all else 2)
    mode = ["--user"] if user_manager else []
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *mode, *files], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
def test_exposure_stays_low(recipe):
    output = written(recipe, Role.all, run_as="nobody")
    for path in sorted(output.glob("*.service")):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
        assert found, done.stderr
        assert float(found[1]) <= MOST_EXPOSURE, path.name


def test_units_start_what_a_person_could_type(recipe):
    output = written(recipe, Role.all)
    folder = str(recipe.folder)
    broker, learner, actor = (
        settings(output / f"slipstream-{name}.service", "ExecStart")[0]
        for name in ("broker", "learner", "actor@")
    )
    unescaped = [shlex.split(line.replace("%%", "%")) for line in (broker, learner, actor)]
    assert unescaped[0][1:] == ["broker", f"{folder}/recipe.toml", "--resume"]
    assert unescaped[1][1:] == ["learner", "--run", folder, "--resume"]
    assert unescaped[2][1:] == ["actor", "--run", folder, "--name", "%H-%i"]
    assert (recipe.folder / "recipe.toml").exists(), "the broker's host has a run folder to continue"


def test_every_worker_is_watched_and_ends_with_its_group(recipe):
    output = written(recipe, Role.all)
    for path in output.glob("*.service"):
        assert settings(path, "Type") == ["notify"]
        assert settings(path, "KillMode") == ["control-group"]
        assert settings(path, "RestartPreventExitStatus") == ["2 4"]
        interrupted = (
            ["3"] if path.name == "slipstream-broker.service" else []
        )  # of which the run knows nothing
        assert settings(path, "SuccessExitStatus") == settings(path, "RestartForceExitStatus") == interrupted
        assert settings(path, "WatchdogSec"), path.name
        assert settings(path, "NoNewPrivileges") == ["yes"]


def test_target_starts_what_the_host_has(recipe):
    output = written(recipe, Role.actor, actors=3, join="head:5555")
    assert settings(output / "slipstream.target", "Wants") == [
        "slipstream-actor@0.service slipstream-actor@1.service slipstream-actor@2.service"
    ]
    assert not (output / "slipstream-broker.service").exists()
    assert "--join head:5555" in settings(output / "slipstream-actor@.service", "ExecStart")[0]
    assert not recipe.folder.exists(), "a host that only has actors holds no run folder"


def test_writing_again_continues_the_run(recipe):
    written(recipe, Role.all)
    marker = recipe.folder / "metrics.jsonl"
    marker.write_text("kept\n")
    written(recipe, Role.all)
    assert marker.read_text() == "kept\n"


def environment(path: Path) -> dict[str, str]:
    """Variables of an environment file."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))


def test_workers_find_what_the_callers_shell_finds(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", 'a "b" $c')
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("NCCL_ODD", "two\nlines")
    monkeypatch.setenv("UNRELATED_SECRET", "x")
    output = written(recipe, Role.all)
    found = environment(output / "slipstream.env")
    assert found["HF_HOME"] == str(tmp_path / "cache" / "huggingface"), "where models and token are"
    assert found["MLFLOW_TRACKING_URI"] == "http://tracker:5000"
    assert found["MLFLOW_TRACKING_PASSWORD"] == '"a \\"b\\" \\$c"'
    assert found["https_proxy"] == "http://proxy:3128"
    assert found["NCCL_IB_HCA"] == "mlx5"
    assert not {"NCCL_ODD", "UNRELATED_SECRET"} & set(found)
    assert {oct(path.stat().st_mode & 0o777) for path in output.glob("*.env")} == {"0o600"}
    monkeypatch.setenv("HF_HOME", "/data/hub")
    written(recipe, Role.all)
    assert environment(output / "slipstream.env")["HF_HOME"] == "/data/hub"
    assert "-/data/hub" in settings(output / "slipstream-learner.service", "ReadWritePaths")[0]


def test_another_accounts_models_are_its_own(recipe, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    account = next(entry for entry in pwd.getpwall() if entry.pw_name != getpass.getuser())
    output = written(recipe, Role.all, run_as=account.pw_name)
    found = environment(output / "slipstream.env")["HF_HOME"]
    assert found == str(Path(account.pw_dir) / ".cache" / "huggingface")
    with pytest.raises(UserError, match="--run-as: there is no account 'nobody-at-all'"):
        written(recipe, Role.all, run_as="nobody-at-all")


@pytest.mark.parametrize("roles", [(Role.broker, Role.learner), (Role.all,)])
def test_a_host_may_have_the_learner_and_no_actor(recipe, roles, monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: (list(range(16)), [str(i) for i in range(8)]))
    update = {"learner": recipe.learner.model_copy(update={"ranks": 8})}
    wide = recipe.model_copy(update={**update, "launch": recipe.launch.model_copy(update={"device": "gpu"})})
    output = written(wide, *roles, actors=0)
    assert settings(output / "slipstream.target", "Wants") == [
        "slipstream-broker.service slipstream-learner.service"
    ]
    found = environment(output / "slipstream-learner.env")
    assert found["OMP_NUM_THREADS"] == "2", "eight ranks share sixteen cores"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert "--ranks 8" in settings(output / "slipstream-learner.service", "ExecStart")[0]
    assert "slipstream-broker.service" in settings(output / "slipstream-learner.service", "After")


def test_a_second_call_does_not_forget_what_the_first_has_written(recipe):
    output = written(recipe, Role.broker)
    with pytest.raises(UserError, match="--host-role: '.*' holds a unit of the broker"):
        written(recipe, Role.learner)
    assert settings(output / "slipstream.target", "Wants") == ["slipstream-broker.service"]
    written(recipe, Role.broker, Role.learner)


@pytest.mark.parametrize("join", ["head", "head:0", ":5555", "head:port"])
def test_an_address_to_join_has_a_port(recipe, join):
    with pytest.raises(UserError, match=f"--join: '{join}' is not HOST:PORT"):
        written(recipe, Role.actor, join=join)


def test_words_survive_systemds_quoting():
    assert quoted(["a b", "50%", "$HOME", 'say "x"', "plain"]) == '"a b" 50%% $$HOME "say \\"x\\"" plain'
    with pytest.raises(UserError, match="unit file"):
        escaped("two\nlines")


def test_contradiction_is_one_sentence(recipe):
    with pytest.raises(UserError, match="--join: this host runs the broker itself"):
        written(recipe, Role.all, join="head:5555")
