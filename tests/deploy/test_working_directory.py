"""What lies in the working directory is a user's own: it never stands before a package of Slipstream's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.program import own_program
from common.verifier import Outcome, VerifierPool, load_reward

REPOSITORY = Path(__file__).resolve().parents[2]
REWARD = """
def one(response, question):
    import helper  # found as well when the function runs
    return helper.VALUE
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with names of Slipstream's packages, and a reward function."""
    (tmp_path / "studies" / "out").mkdir(parents=True)  # `slipstream study` makes it
    for name in ("deploy", "common", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "helper.py").write_text("VALUE = 1.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def slipstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*own_program(), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_packages_are_our_own_and_the_reward_function_is_the_users(here: Path) -> None:
    assert Path(own_program()[0]).is_absolute()
    listed = slipstream("study", "list")
    assert (listed.returncode, "dr-grpo" in listed.stdout) == (0, True), listed.stderr
    checked = slipstream("check", "demo", "--set", "data.reward=my_rewards:one")
    assert checked.returncode == 0, checked.stderr
    absent = slipstream("check", "demo", "--set", "data.reward=my_rewards:two")
    assert (absent.returncode, "data.reward" in absent.stderr) == (2, True), absent.stderr


def test_the_verifiers_workers_find_it_too(here: Path) -> None:
    before = list(sys.path)
    load_reward("my_rewards:one")
    assert sys.path == before
    with VerifierPool(workers=1, reward="my_rewards:one") as pool:
        (verdict,) = pool.grade_many([("x", {})])
    assert verdict.verdict is Outcome.CORRECT, verdict.reason
