"""Figures 1, 5, 8, 9: GRPO, Dr. GRPO and both ablations over several seeds: reward, length, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from studies.curves import at_end, claim, run_curve, score, size, spread
from studies.figures import COLOURS, NAMES, band, grid
from studies.probing import as_problems
from studies.questions import held_out, training_set
from studies.study import Setting, Study, Table, Unit
from studies.training import Run
from studies.verdict import Expectation, Row, per_seed
from studies.zoo import where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALGORITHMS = ("dr_grpo", "grpo", "wo_len", "wo_std")
RECIPES = {"dr_grpo": "fig8-dr-grpo", "grpo": "fig8-grpo", "wo_len": "fig8-wo-len", "wo_std": "fig8-wo-std"}
MODEL = "filler"
MAX_TOKENS = 64


def mini_run(algorithm: str, seed: int, setting: Setting) -> Run:
    """One miniature run."""
    return Run(
        model=where(MODEL, 0, setting),
        problems=as_problems(training_set("orz", size(setting, 1000, 16), seed)),
        held_out=as_problems(held_out(size(setting, 100, 4))),
        algorithm=algorithm,
        template="no",
        steps=size(setting, 80, 2),
        questions=size(setting, 16, 4),
        group=size(setting, 8, 4),
        max_tokens=size(setting, MAX_TOKENS, 12),
        seed=seed,
    )


def _ratio(key: str, top: str, bottom: str):
    return claim(lambda rows: at_end(rows, key, algorithm=top) / at_end(rows, key, algorithm=bottom))


class DrGrpo(Study):
    """See the module."""

    name = "dr-grpo"
    shows = "Figures 1, 5, 8, 9"
    paper = (
        "With GRPO responses, wrong ones above all, keep growing after the reward has stopped; Dr. GRPO reaches the "
        "same or a better accuracy with shorter responses. The length term explains it: without it lengths stay as "
        "with Dr. GRPO, without the std term they grow as with GRPO. Over three seeds."
    )
    miniature = (
        "One base model whose text holds filler lines after the line that decides the method (without it the bias "
        "cannot act), 80 steps of 16 questions x 8 responses, budget 64 tokens, three seeds, learning rate 1e-3. Tried "
        "before: 3e-4, with which the policy hardly learnt in 80 steps (Dr. GRPO, seed 0: reward 0.24 to 0.34)."
    )
    expectations = (
        Expectation(
            "length of wrong responses at the end, GRPO / Dr. GRPO",
            _ratio("length_incorrect", "grpo", "dr_grpo"),
            1.3,
        ),
        Expectation(
            "length of wrong responses at the end, without std term / without length term",
            _ratio("length_incorrect", "wo_std", "wo_len"),
            1.3,
        ),
        Expectation(
            "held-out accuracy at the end, Dr. GRPO - GRPO",
            claim(lambda rows: score(rows, algorithm="dr_grpo") - score(rows, algorithm="grpo")),
            -0.05,
        ),
        Expectation(
            "held-out accuracy, Dr. GRPO, end - start",
            claim(lambda rows: score(rows, algorithm="dr_grpo") - score(rows, "first", algorithm="dr_grpo")),
            0.1,
        ),
    )

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        return [(MODEL, 0)]

    def units(self, setting: Setting) -> list[Unit]:
        return [
            Unit(f"{algorithm}/seed-{seed}", {"algorithm": algorithm, "seed": seed})
            for seed in setting.seeds
            for algorithm in ALGORITHMS
        ]

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        algorithm, seed = unit.arguments["algorithm"], unit.arguments["seed"]
        rows = run_curve(
            lambda: mini_run(algorithm, seed, setting),
            setting,
            recipe=RECIPES[algorithm],
            name=f"{algorithm}-seed-{seed}",
            settings={"run.seed": seed},
        )
        return [{"algorithm": algorithm, "seed": seed, **row} for row in rows]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells = [("objective", "reward", "length", "length, right", "length, wrong", "accuracy")]
        for name in ALGORITHMS:
            ends = [
                spread(per_seed(rows, lambda seed, key=key, name=name: at_end(seed, key, algorithm=name)))
                for key in ("reward", "length", "length_correct", "length_incorrect")
            ]
            accuracy = spread(per_seed(rows, lambda seed, name=name: score(seed, algorithm=name)))
            cells.append((NAMES[name], *ends, accuracy))
        return [Table("At the end of training: mean (range) over seeds", cells)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        axes = grid(figure, 2, 3)
        titles = {
            "reward": "training reward",
            "length": "response length",
            "length_correct": "length, right",
            "length_incorrect": "length, wrong",
        }
        for name in ALGORITHMS:
            style = {"color": COLOURS[name], "label": NAMES[name]}
            train = [row for row in rows if row["kind"] == "train" and row["algorithm"] == name]
            tests = [row for row in rows if row["kind"] == "eval" and row["algorithm"] == name]
            for axis, key in zip(axes, titles, strict=False):
                band(axis, train, "step", key, smooth=5, **style)
            band(axes[4], tests, "step", "score", marker="o", **style)
            _draw_efficiency(axes[5], train, style)
        for axis, title in zip(axes, titles.values(), strict=False):
            axis.set(title=title, xlabel="step")
        axes[4].set(title="held-out accuracy, greedy", xlabel="step")
        axes[5].set(title="token efficiency", xlabel="response length", ylabel="reward")
        axes[0].legend(frameon=False, fontsize="small")


def _draw_efficiency(axis, rows: Sequence[Row], style: dict) -> None:
    """Figure 1 right: reward against length, one point per tenth of the run, mean over seeds."""
    last = max((row["step"] for row in rows), default=0) + 1
    points = []
    for part in range(10):
        some = [row for row in rows if part / 10 <= row["step"] / last < (part + 1) / 10]
        if some:
            points.append([sum(row[key] for row in some) / len(some) for key in ("length", "reward")])
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
