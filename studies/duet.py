"""Figure 6, Table 3: how prompt template and question set play together in reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from studies.curves import claim, of_base, run_curve, score, small_run, spread, units_of
from studies.figures import band, grid
from studies.questions import PARTS
from studies.study import Setting, Study, Table, Unit
from studies.verdict import Expectation, Row, mean, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = ("no", "qwen_math", "r1")
SETS = ("orz", "math", "gsm8k", "asdiv")
MODEL = "qwen-math-r1"
_KINDS = ", ".join(f"{name} (kinds of question: {len(parts)})" for name, parts in PARTS.items())
TITLES = {"no": "no template", "qwen_math": "Qwen-Math template", "r1": "R1 template"}
_SHORT = {"qwen_math": "qwen"}  # in the names of the recipes


def _start(rows: Sequence[Row], template: str) -> float:
    return mean([score(rows, "first", template=template, set=name) for name in SETS])


def _ends(rows: Sequence[Row], template: str) -> list[float]:
    return [score(rows, template=template, set=name) for name in SETS]


def _range(rows: Sequence[Row], template: str) -> float:
    ends = _ends(rows, template)
    return max(ends) - min(ends)


class Duet(Study):
    """See the module."""

    name = "duet"
    shows = "Figure 6, Table 3"
    paper = (
        "A template that does not match the base model destroys its ability first, and reinforcement learning "
        "rebuilds it: accuracy starts highest without template and lowest with R1. Under R1 the question set "
        "decides how far it gets (broad sets further than narrow ones); under a matching template even the small, "
        "easy GSM8K does as well as MATH."
    )
    miniature = (
        "The qwen-math model with 0.7 % of dialogues in R1's form (without any it never earned a reward under that "
        "template; with them 0.06 to 0.39 in 16 steps of GRPO), Dr. GRPO, 30 steps for each of 3 templates x 4 "
        f"question sets from broad to narrow: {_KINDS}. "
        "Accuracy on held-out questions of all kinds. Step size and batch were chosen as in `dr-grpo`."
    )
    remark = (
        "The accuracies at the start are those of one base model, which all seeds share: three templates, 0.19 "
        "and 0.46 apart on the same 80 questions, but no repetition, so that nothing is said of other base "
        "models. The difference between gsm8k and math varies more between seeds than the claim allows for."
    )
    expectations = (
        Expectation(
            "accuracy at the start, no template - Qwen-Math",
            of_base(lambda rows: _start(rows, "no") - _start(rows, "qwen_math")),
            0.0,
            unit="base models",
        ),
        Expectation(
            "accuracy at the start, Qwen-Math - R1",
            of_base(lambda rows: _start(rows, "qwen_math") - _start(rows, "r1")),
            0.0,
            unit="base models",
        ),
        Expectation(
            "range over question sets at the end, R1 - Qwen-Math",
            claim(lambda rows: _range(rows, "r1") - _range(rows, "qwen_math")),
            0.0,
        ),
        Expectation(
            "R1 at the end, mean of the other sets - asdiv",
            claim(lambda rows: mean(_ends(rows, "r1")[:3]) - _ends(rows, "r1")[3]),
            0.0,
        ),
        Expectation(
            "Qwen-Math at the end, gsm8k - math",
            claim(lambda rows: _ends(rows, "qwen_math")[2] - _ends(rows, "qwen_math")[1]),
            -0.05,
        ),
    )

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        return [(MODEL, 0)]

    def units(self, setting: Setting) -> list[Unit]:
        return units_of(setting, ({"template": of, "set": name} for of in TEMPLATES for name in SETS))

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        template, name, seed = (unit.arguments[key] for key in ("template", "set", "seed"))
        return run_curve(
            unit,
            setting,
            lambda: small_run(
                setting,
                MODEL,
                seed=seed,
                training=name,
                problems=400,
                template=template,
                steps=30,
                eval_every=10,
            ),
            recipe=f"duet-{_SHORT.get(template, template)}-{name}",
        )

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells: list[tuple[str, ...]] = [("template", *SETS)]
        for template in TEMPLATES:
            texts = []
            for name in SETS:
                first, last = (
                    spread(per_seed(rows, partial(score, step=when, template=template, set=name)))
                    for when in ("first", "last")
                )
                texts.append(f"{first} → {last}")
            cells.append((template, *texts))
        return [Table("Held-out accuracy, start → end: mean (range) over seeds", cells)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        for axis, template in zip(grid(figure, 1, 3), TEMPLATES, strict=True):
            for name in SETS:
                chosen = [
                    r for r in rows if r["kind"] == "eval" and r["template"] == template and r["set"] == name
                ]
                band(axis, chosen, "step", "score", marker="o", markersize=3, label=name)
            axis.set(title=TITLES[template], xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
        axis.legend(frameon=False, fontsize="small", title="question set")
