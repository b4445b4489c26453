"""How the step size and the batch of the miniature runs were chosen: `python -m studies.pilot`.

Invariant: a pilot sees the training reward of plain GRPO alone, and a seed that no study uses. Lengths, held-out
accuracy and whatever a study checks are not looked at, so that no setting can be tuned to a verdict.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from studies.verdict import mean

SEED = 100
STEPS = 60
PARTS = 6  # of a run, each shown as one mean

# What the studies say of it.
PILOT = (
    "Learning rate 3e-4 and 32 questions were chosen by a pilot (studies.pilot) on GRPO's training reward alone, "
    "with another seed: 16 questions and 3e-3 or 1e-3 destroyed the policy (reward 0.09 to 0.00 and 0.20 to 0.07 in "
    "40 steps), 5e-4 stood still (0.22 to 0.26 in 60), 1e-4, 2e-4 and 3e-4 rose (0.24 to 0.33, 0.32 and 0.37), 3e-4 "
    "with 32 questions most (0.29 to 0.41)."
)


def reward_curve(model: str, lr: float, questions: int) -> list[float]:
    """Mean training reward of plain GRPO over each part of a run."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from studies.probing import as_problems
    from studies.questions import training_set
    from studies.training import Run, train

    torch.set_num_threads(1)
    run = Run(
        model=model,
        problems=as_problems(training_set("orz", 1000, SEED)),
        held_out=as_problems(training_set("orz", 1, SEED)),  # a run answers some; nobody reads it
        algorithm="grpo",
        steps=STEPS,
        questions=questions,
        max_tokens=64,
        lr=lr,
        eval_every=STEPS,
        seed=SEED,
    )
    rewards = [row["reward"] for row in train(run) if row["kind"] == "train"]
    width = STEPS // PARTS
    return [mean(rewards[part * width : (part + 1) * width]) for part in range(PARTS)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per setting."""
    parser = argparse.ArgumentParser(prog="python -m studies.pilot", description=__doc__)
    parser.add_argument("--model", default="studies/out/zoo/filler-seed-0", type=Path)
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--questions", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)
    settings = list(product(options.lr, options.questions))
    with ProcessPoolExecutor(options.jobs) as pool:
        curves = [pool.submit(reward_curve, str(options.model), lr, count) for lr, count in settings]
        for (lr, count), curve in zip(settings, curves, strict=True):
            rewards = " ".join(f"{value:.3f}" for value in curve.result())
            print(f"lr {lr:g}, {count} questions: reward {rewards}", flush=True)


if __name__ == "__main__":
    main()
