"""The whole pipeline, every part real: what the engine computes with is what the learner has learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.tracking.catalogue import GROUPS, entry_of, full_name

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6

RECIPE = f"""
extends = "{REPOSITORY / "recipes" / "demo.toml"}"
[run]
name = "proof"
root = "ROOT"
steps = {STEPS}
[model]
path = "{REPOSITORY / "models" / "minimath-base"}"
[batch]
questions_per_step = 8
max_staleness = 1
[learner]
lr = 1e-3
checkpoint_every = 3
[broker]
record = true
[weights]
checksum_every = 1
[eval]
every = 3
limit = 10
samples = 1
[tracking]
enabled = false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A finished run's folder, and what was seen inside the engine after it."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = folder / "proof.toml"
    recipe.write_text(RECIPE.replace("ROOT", str(folder)))
    with (folder / "proof.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.pipeline_proof", str(recipe), str(folder)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=540,
            check=False,
        )
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, logs
    return folder / "proof", json.loads((folder / "proof.json").read_text())


def points(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [point["values"] for point in map(json.loads, lines) if point["kind"] == kind]


@pytest.mark.e2e
def test_weights_in_the_engine_are_the_learners(run: tuple[Path, dict]) -> None:
    _, found = run
    parts = {name.split(".")[-2] for name in found["weights"]}
    assert parts >= {"embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "norm", "lm_head"}
    assert found["weights"] == found["exported"]
    base = load_file(REPOSITORY / "models" / "minimath-base" / "model.safetensors")
    trained = load_file(next((run[0] / "checkpoints").glob("step-*/hf/model.safetensors")))
    assert not torch.equal(base["model.norm.weight"], trained["model.norm.weight"]), "nothing was learnt"


@pytest.mark.e2e
def test_greedy_answers_equal_a_fresh_engines(run: tuple[Path, dict]) -> None:
    _, found = run
    assert found["greedy"] == found["greedy_fresh"]
    assert len({tuple(answer) for answer in found["greedy"]}) > 5


@pytest.mark.e2e
def test_recorded_log_probabilities_are_the_learners(run: tuple[Path, dict]) -> None:
    folder, _ = run
    steps = points(folder, "learner")
    mismatches = [step["mismatch_max"] for step in steps if "mismatch_max" in step]
    assert mismatches, "some tokens must have been compared at the same version"
    assert max(mismatches) <= 1e-3
    assert max(step["staleness_max"] for step in steps) <= 1


@pytest.mark.e2e
def test_every_push_is_probed(run: tuple[Path, dict]) -> None:
    probed = [
        values["weights_probe_max"] for values in points(run[0], "actor") if "weights_probe_max" in values
    ]
    assert len(probed) >= STEPS // 2
    assert 0 < max(probed) <= 1e-3


@pytest.mark.e2e
def test_a_run_emits_no_metric_that_is_not_in_the_catalogue(run: tuple[Path, dict]) -> None:
    folder, _ = run
    for kind in GROUPS:
        found = points(folder, kind)
        assert found, f"no point of kind {kind}"
        unknown = {name for values in found for name in values if entry_of(full_name(kind, name)) is None}
        assert not unknown, f"add {unknown} to common/tracking/catalogue.py"
    sampled = next(values for values in reversed(points(folder, "actor")) if values["groups"])
    assert 0 <= sampled["groups_all_wrong"] <= 1 - sampled["accuracy"]


@pytest.mark.e2e
def test_the_ledger_adds_up_and_the_run_is_complete(run: tuple[Path, dict]) -> None:
    folder, found = run
    summary = json.loads((folder / "summary.json").read_text())
    ledger = summary["ledger"]
    assert ledger["sum_ok"]
    assert ledger["consumed"] + ledger["filtered"] == STEPS * 8
    assert ledger["in_flight"] == ledger["buffered"] == ledger["taken"] == 0
    assert (summary["steps"], summary["versions"], summary["heldout_version_last"]) == (STEPS, STEPS, STEPS)
    assert found["way"] == "stop"
    assert (folder / "progress.png").stat().st_size > 10_000
    kept = sorted((folder / "checkpoints").iterdir())
    assert kept


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(folder.glob("checkpoints/step-*/hf/model.safetensors"))[-1])


@pytest.mark.e2e
def test_a_replay_of_the_record_trains_the_same_weights(run: tuple[Path, dict]) -> None:
    folder, _ = run
    command = [sys.executable, "-m", "deploy", "learner", "--replay", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, timeout=540, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replayed = folder.with_name(f"{folder.name}-replay-1")
    losses = [[step["loss"] for step in points(of, "learner")] for of in (folder, replayed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    recorded, again = last_checkpoint(folder), last_checkpoint(replayed)
    assert recorded.keys() == again.keys()
    assert all(torch.equal(recorded[name], again[name]) for name in recorded)
