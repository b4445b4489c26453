"""The demo as a user sees it: time to the first optimizer step, whole run, accuracy, who waits.

usage: python -m benchmarks.demo [RECIPE] [--set key=value ...]

Runs `slipstream run RECIPE` in a temporary folder on an otherwise idle machine and prints a Markdown table of
the figures beside their targets (two cores, after the install). Exit code 1 when one is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.run_files import SPOOL, SUMMARY_FILE

TARGETS: dict[str, tuple[str, float]] = {
    "first optimizer step after the command (s)": ("<=", 60.0),
    "whole command (s)": ("<=", 360.0),
    "held-out pass@1 first": ("<", 0.50),
    "held-out pass@1 last": (">=", 0.85),
    "learner idle share": ("<", 0.15),
}


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run the recipe once; figures by the names of `TARGETS`, and more."""
    recipe, *options = arguments or ["demo"]
    with tempfile.TemporaryDirectory() as root:
        started = time.time()
        command = [
            sys.executable,
            "-m",
            "deploy",
            "run",
            recipe,
            "--quiet",
            "--set",
            f"run.root='{root}'",
            *options,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.time() - started
        summary_path = next(Path(root).glob(f"*/{SUMMARY_FILE}"))
        summary = json.loads(summary_path.read_text())
        lines = (summary_path.parent / SPOOL).read_text().splitlines()
    first_step = next(point["time"] for point in map(json.loads, lines) if point["kind"] == "learner")
    return {
        "first optimizer step after the command (s)": first_step - started,
        "whole command (s)": seconds,
        "training, first lease to last commit (s)": summary["seconds"],
        "held-out pass@1 first": summary["heldout_pass1_first"],
        "held-out pass@1 last": summary["heldout_pass1_last"],
        "held-out greedy last": summary["heldout_greedy_last"],
        "learner idle share": summary["learner_idle_share"],
        "actor tokens/s": summary["actor_tokens_per_s"],
        "learner tokens/s": summary["learner_tokens_per_s"],
        "staleness max": summary["staleness_max"],
        "mismatch max (nats)": summary["mismatch_max"],
    }


def met(value: float, target: tuple[str, float]) -> bool:
    """Whether a figure meets its target."""
    sign, bound = target
    return {"<=": value <= bound, "<": value < bound, ">=": value >= bound}[sign]


def main() -> int:
    """Measure, print, judge."""
    figures = measure(sys.argv[1:])
    missed = 0
    print("| figure | measured | target |\n|---|---|---|")
    for name, value in figures.items():
        target = TARGETS.get(name)
        goal = f"{target[0]} {target[1]:g}" if target else ""
        if target and not met(value, target):
            missed += 1
            goal += " (missed)"
        print(f"| {name} | {value:.4g} | {goal} |")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
