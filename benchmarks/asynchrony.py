"""The demo against itself without asynchrony: the same recipe with `batch.max_staleness = 0`.

    python -m benchmarks.asynchrony [RECIPE] [--steps 60] [--seeds 1] [--set key=value ...]

Without staleness the actor may not sample the next batch before it holds the weights of the last one, so that
generation and training take turns. Prints one line of JSON per run, then the ratio of steps per second (from the
first step to the last) and the difference of the held-out accuracies of the last version, each the mean over
the seeds. Accuracy is pass@1 at temperature 1 on the recipe's held-out questions; both sides evaluate the first
and the last version only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.whole_run import BARE, WholeRun, run

SIDES = {"asynchronous": [], "synchronous": ["batch.max_staleness=0"]}
KEPT = [setting for setting in BARE if not setting.startswith("eval.")]


def main() -> None:
    """Run both sides in turn."""
    options = _options()
    found: dict[str, list[WholeRun]] = {side: [] for side in SIDES}
    for seed in options.seeds:
        for side, settings in SIDES.items():
            common = [*KEPT, "eval.every=1000000", f"run.steps={options.steps}", f"run.seed={seed}"]
            with tempfile.TemporaryDirectory() as root:
                whole = run(options.recipe, [*common, *options.set, *settings], Path(root))
            found[side].append(whole)
            print(json.dumps({"side": side, "seed": seed, **_figures(whole)}), flush=True)
    rates = {side: fmean(steps_per_second(whole) for whole in runs) for side, runs in found.items()}
    final = {
        side: fmean(whole.summary["heldout_pass1_last"] for whole in runs) for side, runs in found.items()
    }
    verdict = {
        "steps_per_s": {side: round(rate, 3) for side, rate in rates.items()},
        "times_faster": round(rates["asynchronous"] / rates["synchronous"], 2),
        "heldout_pass1_last": {side: round(value, 4) for side, value in final.items()},
        "difference": round(final["asynchronous"] - final["synchronous"], 4),
    }
    print(json.dumps(verdict))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="both sides")
    return parser.parse_args()


def steps_per_second(whole: WholeRun) -> float:
    """From the end of the first step to the end of the last."""
    ended = whole.curve.ended
    return (len(ended) - 1) / (ended[-1] - ended[0])


def _figures(whole: WholeRun) -> dict[str, float]:
    names = (
        "heldout_pass1_first",
        "heldout_pass1_last",
        "learner_idle_share",
        "staleness_mean",
        "staleness_max",
    )
    return {"steps_per_s": round(steps_per_second(whole), 3)} | {name: whole.summary[name] for name in names}


if __name__ == "__main__":
    main()
