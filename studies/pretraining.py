"""Figure 7: what domain pretraining does to the ceiling of reinforcement learning, and GRPO's double increase."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from studies.curves import at_end, claim, of_base, run_curve, score, small_run, spread, units_of
from studies.figures import COLOURS, NAMES, band, grid
from studies.study import Setting, Study, Table, Unit
from studies.verdict import Expectation, Row, per_seed
from studies.zoo import HUB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASES = ("llama", "finemath", "numina")
# (base, algorithm): figure 7 left compares bases, figure 7 right algorithms on the last one.
RUNS = (*((base, "dr_grpo") for base in BASES), ("numina", "grpo"))


def _score(rows: Sequence[Row], base: str, when: str = "last", algorithm: str = "dr_grpo") -> float:
    return score(rows, when, base=base, algorithm=algorithm)


def _length(rows: Sequence[Row], algorithm: str) -> float:
    return at_end(rows, "length", base="numina", algorithm=algorithm)


class Pretraining(Study):
    """See the module."""

    name = "pretraining"
    shows = "Figure 7"
    paper = (
        "Domain pretraining raises the ceiling: plain Llama-3.2-3B gains little from reinforcement learning, after "
        "mathematical text it gains more, and after concatenated question-answer text it starts lowest and ends "
        "highest. On that base GRPO's length rises with its reward (a double increase); Dr. GRPO gets there shorter."
    )
    miniature = (
        "A chain of three base models: running text (llama), then mathematical text (finemath), then concatenated "
        "question-answer text (numina); Dr. GRPO under R1's template, 40 steps of 16 questions x 8 responses, and "
        "GRPO on the last base. Settings were chosen as in `dr-grpo`, on reward alone. Without any dialogue in R1's "
        "form in its last text, numina never earned a reward in 24 steps; a share of 0.5 % is enough (0.18 to 0.41 in "
        "16 steps of GRPO)."
    )
    expectations = (
        Expectation(
            "accuracy at the end, finemath - llama",
            claim(lambda rows: _score(rows, "finemath") - _score(rows, "llama")),
            0.0,
        ),
        Expectation(
            "accuracy at the end, numina - llama",
            claim(lambda rows: _score(rows, "numina") - _score(rows, "llama")),
            0.05,
        ),
        Expectation(
            "accuracy at the start, lower of llama and finemath - numina",
            of_base(
                lambda rows: (
                    min(_score(rows, "llama", "first"), _score(rows, "finemath", "first"))
                    - _score(rows, "numina", "first")
                )
            ),
            0.0,
            unit="base models",
        ),
        Expectation(
            "numina, response length at the end, GRPO / Dr. GRPO",
            claim(lambda rows: _length(rows, "grpo") / _length(rows, "dr_grpo")),
            1.2,
        ),
        Expectation(
            "numina, accuracy at the end, Dr. GRPO - GRPO",
            claim(lambda rows: _score(rows, "numina") - _score(rows, "numina", algorithm="grpo")),
            -0.05,
        ),
    )

    remark = (
        "The order of the ceilings is there in each seed: reward of plain llama stands still (0.12 to 0.13), "
        "numina more than doubles its accuracy; finemath's lead over llama is too small for three seeds. numina "
        "does not start lowest (0.14 above the lower of the others, in the one chain of base models that there "
        "is): even 0.5 % of dialogues in R1's form is enough for a parent that knew the form. Length does not "
        "move with either objective: the probable reasons are those of `dr-grpo`."
    )

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        return [(base, 0) for base in BASES]

    def units(self, setting: Setting) -> list[Unit]:
        return units_of(setting, ({"base": base, "algorithm": algorithm} for base, algorithm in RUNS))

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        base, algorithm, seed = (unit.arguments[key] for key in ("base", "algorithm", "seed"))
        return run_curve(
            unit,
            setting,
            lambda: small_run(
                setting,
                base,
                seed=seed,
                problems=600,
                algorithm=algorithm,
                template="r1",
                steps=40,
                max_tokens=64,
                eval_every=10,
            ),
            recipe="paper-3b-numinaqa",
            settings={"model.path": HUB[base], "algorithm.preset": algorithm},
        )

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells = [("base and objective", "accuracy, start", "accuracy, end", "length, end")]
        for base, algorithm in RUNS:
            names: dict[str, Any] = {"base": base, "algorithm": algorithm}
            first, last = (
                spread(per_seed(rows, partial(score, step=when, **names))) for when in ("first", "last")
            )
            length = spread(per_seed(rows, partial(at_end, key="length", **names)), 1)
            cells.append((f"{base}, {NAMES[algorithm]}", first, last, length))
        return [Table("Mean (range) over seeds", cells)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        left, middle, right = grid(figure, 1, 3)
        for base in BASES:
            chosen = [r for r in rows if (r["kind"], r["base"], r["algorithm"]) == ("eval", base, "dr_grpo")]
            band(left, chosen, "step", "score", marker="o", label=base)
        for algorithm in ("dr_grpo", "grpo"):
            style: dict[str, Any] = {"color": COLOURS[algorithm], "label": NAMES[algorithm]}
            mine = [r for r in rows if r["base"] == "numina" and r["algorithm"] == algorithm]
            band(middle, [r for r in mine if r["kind"] == "eval"], "step", "score", marker="o", **style)
            band(right, [r for r in mine if r["kind"] == "train"], "step", "length", smooth=5, **style)
        left.set(title="Dr. GRPO, by base", xlabel="step", ylabel="held-out accuracy")
        middle.set(title="numina: accuracy", xlabel="step", ylabel="held-out accuracy")
        right.set(title="numina: response length", xlabel="step", ylabel="tokens")
        for axis in (left, middle):
            axis.legend(frameon=False, fontsize="small")
