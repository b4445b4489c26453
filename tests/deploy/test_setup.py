"""`make setup` never turns an environment of one kind into the other without being told to."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Stands for Python: answers the version check, "makes" an environment whose programs do nothing, notes what it was asked.
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
if [ "$2" = venv ]; then
    for target; do :; done
    [ "$3" = --clear ] && rm -rf "$target"
    mkdir -p "$target/bin" && cp "$0" "$target/bin/python" && cp "$0" "$target/bin/slipstream"
fi
exit 0
"""
NVIDIA_SMI = "#!/bin/sh\necho GPU 0: pretended\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a pretended Python, and no GPU."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(REPOSITORY / "deploy" / "setup.sh", tmp_path / "deploy")
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "cpu.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    program(tmp_path / "tools" / "python3", PYTHON)
    program(tmp_path / "tools" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, extra: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{checkout / 'tools'}:{os.environ['PATH']}",
        "CALLS": str(checkout / "calls"),
        "PYTHON": str(checkout / "tools" / "python3"),
        "SLIPSTREAM_EXTRA": extra,
    }
    return subprocess.run(
        [checkout / "deploy" / "setup.sh"], env=environment, capture_output=True, text=True, check=False
    )


def kinds(checkout: Path) -> list[str]:
    return [path.name.split("-")[1] for path in (checkout / ".venv").glob(".installed-*")]


def test_a_gpu_environment_stays_one_on_a_login_node(checkout: Path) -> None:
    program(checkout / "tools" / "nvidia-smi", NVIDIA_SMI)
    assert setup(checkout).returncode == 0
    assert kinds(checkout) == ["gpu"]
    program(checkout / "tools" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    (checkout / "calls").unlink()
    refused = setup(checkout)
    assert refused.returncode == 2
    for words in ("is a gpu build", "SLIPSTREAM_EXTRA=gpu", "remove .venv"):
        assert words in refused.stderr
    assert kinds(checkout) == ["gpu"]
    assert "pip" not in (checkout / "calls").read_text()
    assert setup(checkout, "gpu").returncode == 0
    assert "pip" not in (checkout / "calls").read_text(), "it is up to date"


def test_a_cpu_environment_is_refused_on_a_gpu_node_and_built_anew_on_request(checkout: Path) -> None:
    assert setup(checkout).returncode == 0
    (checkout / ".venv" / "of-the-cpu-build").touch()
    program(checkout / "tools" / "nvidia-smi", NVIDIA_SMI)
    assert setup(checkout).returncode == 2
    assert setup(checkout, "gpu").returncode == 0
    assert kinds(checkout) == ["gpu"]
    assert not (checkout / ".venv" / "of-the-cpu-build").exists()


def test_what_extra_may_be(checkout: Path) -> None:
    refused = setup(checkout, "tpu")
    assert (refused.returncode, "'cpu' or 'gpu', not 'tpu'" in refused.stderr) == (2, True)
