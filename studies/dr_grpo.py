"""Figures 1, 5, 8, 9: GRPO, Dr. GRPO and both ablations over several seeds: reward, length, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from studies.curves import at_end, claim, run_curve, score, small_run, spread, units_of
from studies.figures import COLOURS, NAMES, band, grid
from studies.pilot import PILOT
from studies.study import Setting, Study, Table, Unit
from studies.training import Run
from studies.verdict import Expectation, Row, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALGORITHMS = ("dr_grpo", "grpo", "wo_len", "wo_std")
RECIPES = {"dr_grpo": "fig8-dr-grpo", "grpo": "fig8-grpo", "wo_len": "fig8-wo-len", "wo_std": "fig8-wo-std"}
MODEL = "filler"
MAX_TOKENS = 64


def mini_run(algorithm: str, seed: int, setting: Setting) -> Run:
    """One miniature run."""
    return small_run(
        setting,
        MODEL,
        seed=seed,
        problems=1000,
        tested=100,
        algorithm=algorithm,
        steps=100,
        questions=32,
        max_tokens=MAX_TOKENS,
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
        "cannot act), 100 steps of 32 questions x 8 responses, budget 64 tokens, three seeds. " + PILOT
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

    remark = (
        "No pressure on length shows: all four objectives shorten right and wrong responses alike, from 22 tokens "
        "to 19, while they learn about equally well. Probable reasons (not measured): filler is only about a "
        "quarter of a response here, so that 1/length differs by a factor of two between the responses of a "
        "group, where in the tabular policy of `length-bias`, which shows the effect, it differs by sixteen; a "
        "good part of the wrong answers are slips in the arithmetic that comes after the filler, and for these "
        "the length term cancels; and 100 steps of a small step size are few for so small a pressure. Accuracy: "
        "Dr. GRPO is 0.03 below GRPO in each of three seeds, which is chance in a number that moves in hundredths "
        "and no sign of precision; its gain of 0.14 has an interval that reaches below 0.1. Tried: the pilot's "
        "settings; and, without a study of its own, three base models whose text holds up to forty lines of filler "
        "after the only line that decides, so that lengths within a group differ tenfold (one-step questions, budget "
        "96, one seed that no study uses): wrong responses of GRPO were 1.43, 1.12 and 0.86 times as long as those of "
        "Dr. GRPO after 100, 100 and 120 steps, and the gap between wrong and right ones was the same with both, so "
        "that this is drift and no bias. So small a policy does not learn, in as many steps, to stop otherwise after "
        "a wrong line than after a right one. (The minutes above are wall-clock on a crowded machine, summed over two "
        "processes; CPU time was 15.9 minutes.)"
    )

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        return [(MODEL, 0)]

    def units(self, setting: Setting) -> list[Unit]:
        return units_of(setting, ({"algorithm": algorithm} for algorithm in ALGORITHMS))

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        algorithm = unit.arguments["algorithm"]
        return run_curve(
            unit, setting, lambda: mini_run(**unit.arguments, setting=setting), recipe=RECIPES[algorithm]
        )

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells: list[tuple[str, ...]] = [
            ("objective", "reward", "length", "length, right", "length, wrong", "accuracy")
        ]
        for name in ALGORITHMS:
            ends = [
                spread(per_seed(rows, partial(at_end, key=key, algorithm=name)))
                for key in ("reward", "length", "length_correct", "length_incorrect")
            ]
            accuracy = spread(per_seed(rows, partial(score, algorithm=name)))
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
            style: dict[str, Any] = {"color": COLOURS[name], "label": NAMES[name]}
            train = [row for row in rows if row["kind"] == "train" and row["algorithm"] == name]
            tests = [row for row in rows if row["kind"] == "eval" and row["algorithm"] == name]
            for axis, key in zip(axes, titles, strict=False):
                band(axis, train, "step", key, smooth=5, **style)
            band(axes[4], tests, "step", "score", marker="o", **style)
            _draw_efficiency(axes[5], train, style)
        for axis, title in zip(axes, titles.values(), strict=False):
            axis.set(title=title, xlabel="step", ylabel="reward" if title == titles["reward"] else "tokens")
        axes[4].set(title="held-out accuracy, greedy", xlabel="step", ylabel="accuracy")
        axes[5].set(title="token efficiency", xlabel="response length (tokens)", ylabel="reward")
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
