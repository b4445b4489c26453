"""`slipstream plan` against real runs: calibrated from two, it predicts the others.

    python -m benchmarks.plan [--root FOLDER] [--steps 24] [NAME ...]

Runs the demo's recipe on this machine (two cores: one learns, one generates) with the settings of `RUNS`, with a
learning rate of nearly zero, so that lengths and the share of groups without gradient stay what they are and only
the pipeline is predicted. Rates are read from `synchronous` and `staleness-1`; no figure of the other
runs enters their predictions.
Compared are the time of a step, the learner's idle share and the staleness of trained tokens. A prediction holds
when it is within 20 %, or, where the quantity is close to 0, within 5 points of the share and 0.1 versions.

A run that FOLDER holds already is not made again. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.whole_run import run_command
from deploy.folder import holds_a_run, read_recipe
from deploy.planning.calibrate import Calibration, calibrate, measured_figures
from deploy.planning.simulate import simulate
from deploy.report import WARM_UP_STEPS

CALIBRATION = ("synchronous", "staleness-1")
COMMON = (
    "learner.lr=1e-12",
    "broker.record=true",
    "tracking.enabled=false",
    "learner.checkpoint_every=1000",
    "eval.sets=[]",
)
RUNS: dict[str, tuple[str, ...]] = {
    "synchronous": ("batch.max_staleness=0",),
    "staleness-1": ("batch.max_staleness=1",),
    "staleness-4": ("batch.max_staleness=4",),
    "half-batch": ("batch.max_staleness=2", "batch.questions_per_step=16"),
    "few-sequences": ("batch.max_staleness=2", "actor.max_sequences=32"),
    "long-groups": ("batch.max_staleness=1", "rollout.group_size=16", "batch.questions_per_step=16"),
    "evaluated": ("batch.max_staleness=2", "eval.sets=['demo-heldout']", "eval.every=4"),
}
SIMULATED_STEPS = 60
TOLERANCE = 0.20
CLOSE_TO_ZERO = {"step_s": 0.0, "learner_idle": 0.05, "staleness_mean": 0.1}
EVAL_QUESTIONS = 100  # of the demo's recipe (eval.limit)


def main() -> int:
    """Run what is missing, compare, print; 1 when a prediction does not hold."""
    options = _options()
    names = [*CALIBRATION, *(name for name in options.names or RUNS if name not in CALIBRATION)]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        for name in names:
            if not holds_a_run(root / name):
                make_run(root, name, options.steps)
        calibration = calibrate(*(root / name for name in CALIBRATION))
        rows = [row for name in names for row in compare(root / name, calibration)]
    print(json.dumps({"rates": asdict(calibration.rates), "notes": calibration.notes}))
    print("| run | quantity | measured | predicted | error | holds |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['run']} | {row['quantity']} | {row['measured']:.3f} | {row['predicted']:.3f} | "
            f"{row['error']:+.0%} | {'yes' if row['holds'] else '**no**'} |"
        )
    return int(not all(row["holds"] for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"runs to compare: {', '.join(RUNS)}")
    parser.add_argument("--root", help="folder that keeps the runs; default: a temporary one")
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RUNS):
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    return options


def make_run(root: Path, name: str, steps: int) -> None:
    """One real run: broker, learner, actors."""
    settings: Sequence[str] = (
        f"run.root='{root}'",
        f"run.name='{name}'",
        f"run.steps={steps}",
        *COMMON,
        *RUNS[name],
    )
    subprocess.run(run_command("demo", settings), check=True, stdout=sys.stderr)


def compare(folder: Path, calibration: Calibration) -> list[dict[str, Any]]:
    """Predicted beside measured, one row per quantity."""
    recipe, measured = read_recipe(folder), measured_figures(folder)
    sequences = EVAL_QUESTIONS * (1 + recipe.eval.samples) if recipe.eval.sets else 0
    workload = replace(calibration.workload, eval_sequences=sequences)
    predicted = simulate(recipe, calibration.rates, workload, steps=SIMULATED_STEPS, warm_up=WARM_UP_STEPS)
    rows = []
    for quantity, close in CLOSE_TO_ZERO.items():
        known, found = getattr(measured, quantity), getattr(predicted, quantity)
        error = found / known - 1 if known else 0.0
        rows.append(
            {
                "run": folder.name,
                "quantity": quantity,
                "measured": known,
                "predicted": found,
                "error": error,
                "holds": abs(error) <= TOLERANCE or abs(found - known) <= close,
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
