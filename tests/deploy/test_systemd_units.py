"""Units as systemd itself reads them: verified, scored, and quoted so that odd paths stay words."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import load_recipe
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


def written(recipe, role: Role, **changes) -> Path:
    """Write units; returns their folder."""
    output = recipe.run.root.parent / "units"
    write_units(recipe, Host(role=role, output=output, **{"actors": 2, **changes}))
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


def test_words_survive_systemds_quoting():
    assert quoted(["a b", "50%", "$HOME", 'say "x"', "plain"]) == '"a b" 50%% $$HOME "say \\"x\\"" plain'
    with pytest.raises(UserError, match="unit file"):
        escaped("two\nlines")


def test_contradiction_is_one_sentence(recipe):
    with pytest.raises(UserError, match="--join: this host runs the broker itself"):
        written(recipe, Role.all, join="head:5555")
