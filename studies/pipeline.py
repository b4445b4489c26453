"""Full-size runs: the real pipeline, started as a person would start it.

Invariant: a study's rows come from the run folder's own points (`metrics.jsonl`), with the names that the
miniature's rows have; a run that has finished is not run again, one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import RunFailedError
from common.program import own_program
from common.run_files import SPOOL, SUMMARY_FILE
from common.tracking.spool import Record, read_spool
from studies.verdict import Row

# Name in a row -> name in the spool, of the learner's points.
TRAINED = {
    "reward": "reward",
    "ratio_ess": "ratio_ess",
    "clip_low_mean": "clip_low_mean",
    "clip_high_mean": "clip_high_mean",
    "kl_behaviour_mean": "kl_behaviour_mean",
    "entropy_mean": "entropy_mean",
    "gradient": "grad_norm",
}
# Of the actors' points: over all that was sampled, as in the miniature, not only what was sent to the learner.
SAMPLED = ("length", "length_correct", "length_incorrect")


def run_recipe(recipe: str, name: str, root: Path, settings: Mapping[str, Any]) -> list[Row]:
    """Run a recipe to its end and return its rows.

    Args:
        recipe: file or shipped name.
        name: of the run; its folder is `root / name`.
        root: folder of the runs.
        settings: dotted recipe keys to values.

    Raises:
        RunFailedError: the run ended with an error; its own words are on standard error.
    """
    folder = root / name
    if not (folder / SUMMARY_FILE).exists():
        chosen = {**settings, "run.name": name, "run.root": str(root)}
        options = [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        resume = ["--resume"] if (folder / SPOOL).exists() else []
        command = [*own_program(), "run", recipe, "--quiet", *resume, *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise RunFailedError(f"'slipstream run {recipe}' ended with exit code {done.returncode}")
    return [*rows_of(read_spool(folder / SPOOL)), *_wall_clock(folder)]


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Rows of kind `train` and `eval`; a step that was trained again after a rewind counts once, as it was last."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        values = record.values
        if record.kind == "learner":
            rows = {key: row for key, row in rows.items() if key[0] != "train" or key[1] <= record.step}
            found = {name: values.get(key) for name, key in TRAINED.items()} | dict.fromkeys(SAMPLED)
            rows["train", record.step] = {"kind": "train", "step": record.step, **found}
        elif record.kind == "actor" and ("train", record.step) in rows:
            rows["train", record.step] |= {name: values.get(name) for name in SAMPLED}
        elif record.kind == "eval":
            rows["eval", record.step] = {"kind": "eval", "step": record.step, **_evaluation(values)}
    return list(rows.values())


def _evaluation(values: Mapping[str, Any]) -> Row:
    """Greedy accuracy of each set, and their unweighted mean (paper, section 3.4)."""
    sets = {key.removesuffix("/greedy"): value for key, value in values.items() if key.endswith("/greedy")}
    score = sum(sets.values()) / len(sets) if sets else values.get("greedy")
    return {"score": score, "tokens": values.get("greedy_length"), "sets": sets}


def _wall_clock(folder: Path) -> list[Row]:
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    keys = ("seconds", "learner_idle_share", "staleness_mean", "staleness_max")
    return [{"kind": "clock", "step": summary["steps"], **{key: summary.get(key) for key in keys}}]
