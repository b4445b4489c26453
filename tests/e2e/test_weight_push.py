"""The proof of the weight push (weight_push_cases.py), in a process of its own.

Its engines are started by fork, for speed, and a fork is only safe in a process that has no threads yet: inside a
long pytest session it hung.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1200.0


def run_cases(selection: str) -> None:
    """Run the cases of a marker expression; their output is shown when one fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", selection, "tests/e2e/weight_push_cases.py"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S - 60,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.e2e
@pytest.mark.timeout(TIMEOUT_S)
def test_weights_pushed_into_a_running_engine() -> None:
    run_cases("not nightly")


@pytest.mark.e2e
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.nightly
def test_weights_pushed_into_a_running_engine_at_length() -> None:
    run_cases("nightly")
