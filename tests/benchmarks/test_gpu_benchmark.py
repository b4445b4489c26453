"""benchmarks.gpu runs where there is no GPU: by its CPU path on a tiny shape, or not at all and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    done = benchmark()
    assert done.returncode == 2
    assert done.stderr.strip() == "error: benchmarks.gpu needs a GPU, and torch finds none here."
    assert done.stdout == ""


@pytest.mark.e2e
@pytest.mark.nightly
def test_every_part_runs_on_a_tiny_shape() -> None:
    done = benchmark("--device", "cpu", "--shape", "tiny", "--repeats", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    check_learner(next(line for line in lines if line.get("part") == "learner"))
    check_push(next(line for line in lines if line.get("part") == "push"))
    sides = {line["side"]: line["tokens"] for line in lines if "side" in line}
    assert set(sides) == {"bare", "lean", "actor"}
    assert max(sides.values()) < 1.2 * min(sides.values())  # random weights hardly ever end a response
    assert {line["reference"] for line in lines if "reference" in line} == {"bare", "lean"}


def check_learner(line: dict) -> None:
    assert line["tokens_per_s"] > 0
    assert 0 < line["to_matmul"] < 1
    assert line["mfu"] is None  # no data sheet for a CPU
    assert 0 < line["peak_memory_gib"] < 4


def check_push(line: dict) -> None:
    assert line["route"] == "gloo"
    assert line["gigabytes"] > 0
    assert line["seconds"] > 0
