"""A run for tests of the learner process: real broker, real DeepSpeed, scripted actors, a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.recipe.schema import Recipe
from common.tracking.spool import read_spool
from tests.learner.tiny import save_tiny_model
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import scripted_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def learner_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A small recipe whose model can be trained; made-up log-probabilities are no policy's, hence the limit."""
    model = save_tiny_model(folder / "tiny")
    tree: dict[str, dict[str, Any]] = {
        "run": {"steps": 6},
        "model": {"path": str(model), "dtype": "float32"},
        "learner": {"lr": 1e-3, "zero_stage": 1, "checkpoint_every": 2, "max_mismatch": 1e6},
        "data": {"count": 120},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return scripted_recipe(folder, **tree)


def start_learner(address: str, log: Path, *, ranks: int = 1, resume: bool = False) -> subprocess.Popen:
    """`slipstream learner` as a process, or as one with torchrun and its ranks below it."""
    line = [sys.executable, "-m", "deploy", "learner", "--join", address]
    line += [*(["--resume"] if resume else []), *(["--ranks", str(ranks)] if ranks > 1 else [])]
    with log.open("ab") as output:
        return subprocess.Popen(
            line, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
        )


def start_broker(recipe: Recipe, folder: Path, *, resume: bool = False) -> subprocess.Popen:
    """A real broker as a process, to be killed."""
    file = folder / "recipe.json"
    file.write_text(recipe.model_dump_json())
    line = [sys.executable, "-m", "tests.scripted.broker", str(file), *(["--resume"] if resume else [])]
    with (folder / "broker.log").open("ab") as output:
        return subprocess.Popen(line, cwd=REPOSITORY, stdout=output, stderr=output)


@contextmanager
def scripted_actor(address: str, limit: float = math.inf) -> Iterator[ScriptedActor]:
    """An actor in a thread, until it is told to stop or the block ends; it publishes `limit` groups at first."""
    actor = ScriptedActor(address, "actor-0")
    actor.limit = limit
    thread = threading.Thread(target=actor.run, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        actor.stop()
        thread.join(60.0)


def train_points(recipe: Recipe) -> dict[int, dict[str, Any]]:
    """Metrics of each step, the last word on each."""
    points = read_spool(recipe.folder / "metrics.jsonl")
    return {record.step: record.values for record in points if record.kind == "learner"}


def final_status(recipe: Recipe) -> dict[str, Any]:
    """The broker's last status."""
    (end,) = [record for record in read_spool(recipe.folder / "metrics.jsonl") if record.kind == "end"]
    return end.values["final"]


def pointer(recipe: Recipe) -> dict[str, Any]:
    """The checkpoints' pointer."""
    return json.loads((recipe.folder / "checkpoints" / "latest.json").read_text())
