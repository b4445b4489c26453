"""A whole run against TRL's GRPOTrainer: seconds until the mean training reward is 0.80.

    python -m benchmarks.versus_trl [short] [long] [--seeds 1 2] [--side ours|trl]

Two points: `short` is the demo's model and questions; `long` a model of 10 million parameters whose answers are
heavy-tailed up to 256 tokens (made on first use, about eight minutes of one core). Both sides get the same base
model, questions, template, group size, batch, optimizer steps, learning rate, temperature, token budget and
verifier, from one recipe, and the same cores, one after the other. TRL 1.16: loss_type "dr_grpo", scale_rewards
"none", beta 0, generation by Hugging Face, in an environment of its own (`environment.sh`, made on first use).
Neither side evaluates, checkpoints or tracks on the way.

"There" is when the moving average over four steps of the mean reward of all responses reaches the target;
seconds count from the first question to the end of that step, and each side's start-up is printed beside them.
One line of JSON per run, then one per point with the ratio of the median seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.curve import Curve
from benchmarks.whole_run import BARE, run
from common.program import own_program
from common.recipe import find_recipe

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"
POINTS = {"short": "demo", "long": str(HERE / "long.toml")}
BASES = {"long": (HERE / "base.toml", CACHE / "minimath-10m")}  # recipe and folder of what is made here


def main() -> None:
    """Run both sides at every point asked for."""
    options = _options()
    for point in options.points or POINTS:
        _make_base(point)
        curves = {
            side: [_measure(side, point, seed, options) for seed in options.seeds] for side in _sides(options)
        }
        if len(curves) == 2:
            print(json.dumps(_verdict(point, curves, options.target)), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("points", nargs="*", choices=POINTS, help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--side", choices=("ours", "trl"), help="only one side")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--micro-batch", type=int, default=128, help="TRL: responses per forward pass")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="both sides")
    return parser.parse_args()


def _sides(options: argparse.Namespace) -> Sequence[str]:
    return (options.side,) if options.side else ("trl", "ours")


def _make_base(point: str) -> None:
    """The point's base model, unless it is there; `slipstream pretrain` says what it can do."""
    recipe, folder = BASES.get(point, (None, None))
    if folder is not None and not folder.is_dir():
        command = [*own_program(), "pretrain", str(recipe)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=HERE.parents[1])


def _measure(side: str, point: str, seed: int, options: argparse.Namespace) -> Curve:
    train: Callable[..., Curve] = {"ours": _ours, "trl": _trl}[side]
    with tempfile.TemporaryDirectory() as folder:
        curve = train(POINTS[point], seed, Path(folder), options)
    figures = {
        "seconds": _rounded(curve.seconds_to(options.target)),
        "steps": curve.steps_to(options.target),
        "step_s": _rounded(curve.step_s),
        "startup_s": _rounded(curve.startup_s),
        "rewards": [round(reward, 3) for reward in curve.rewards],
    }
    print(json.dumps({"point": point, "side": side, "seed": seed, **figures}), flush=True)
    return curve


def _ours(recipe: str, seed: int, folder: Path, options: argparse.Namespace) -> Curve:
    return run(recipe, [*BARE, f"run.seed={seed}", *options.set], folder).curve


def _trl(recipe: str, seed: int, folder: Path, options: argparse.Namespace) -> Curve:
    environment = CACHE / "trl"
    subprocess.run([HERE / "environment.sh", environment], check=True, stdout=sys.stderr)
    out = folder / "curve.json"
    cores = len(os.sched_getaffinity(0))
    command = [environment / "bin" / "python", "-m", "benchmarks.versus_trl.rival", find_recipe(recipe), out]
    command += [
        "--seed",
        str(seed),
        "--target",
        str(options.target),
        "--micro-batch",
        str(options.micro_batch),
    ]
    command += [part for setting in options.set for part in ("--set", setting)]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | quiet, cwd=HERE.parents[1])
    return Curve(**json.loads(out.read_text()))


def _verdict(point: str, curves: dict[str, list[Curve]], target: float) -> dict[str, Any]:
    """Medians over the seeds; a run that never got there makes the point's ratio null."""
    seconds = {side: [curve.seconds_to(target) for curve in found] for side, found in curves.items()}
    steps = {side: statistics.median(curve.step_s for curve in found) for side, found in curves.items()}
    there = all(value is not None for found in seconds.values() for value in found)
    medians = {side: statistics.median(found) for side, found in seconds.items()} if there else None
    return {
        "point": point,
        "target": target,
        "seconds": medians and {side: round(value, 1) for side, value in medians.items()},
        "times_faster": medians and round(medians["trl"] / medians["ours"], 2),
        "times_faster_per_step": round(steps["trl"] / steps["ours"], 2),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


if __name__ == "__main__":
    main()
