"""A Slurm per test module, and runs on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SEARCH, Cluster, missing_programs, running_cluster

PROGRAM = Path(__file__).parent / "program.py"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm of three nodes; its clients are pointed at it."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found; tests/slurm/install.sh installs it)")
    before = dict(os.environ)
    with running_cluster() as running:
        os.environ.update(SLURM_CONF=str(running.conf), PATH=SEARCH)
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def shared(monkeypatch) -> Iterator[Path]:
    """A folder that all nodes see, and where the submitter stands; its name is not one word."""
    folder = Path(tempfile.mkdtemp(prefix="slipstream run "))
    monkeypatch.chdir(folder)
    yield folder
    if "SLIPSTREAM_KEEP" not in os.environ:  # set it to look at a failed run's files
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def program() -> tuple[str, ...]:
    """`slipstream` with scripted peers."""
    return (sys.executable, str(PROGRAM))


def seen(folder: Path, who: str | None = None, what: str | None = None) -> list[dict]:
    """What workers have noted, in order; see tests/slurm/program.py."""
    try:
        lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    except OSError:
        return []
    return [x for x in lines if who in (None, x["who"]) and what in (None, x["what"])]


def final(folder: Path) -> dict | None:
    """The broker's last word about the run, from metrics.jsonl; None before the end."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return None
    points = [json.loads(line) for line in lines]
    ends = [point["values"] for point in points if point["kind"] == "end"]
    return ends[-1] if ends else None
