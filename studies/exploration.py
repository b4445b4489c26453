"""Figure 3 middle: can a base model be explored from? pass@8 against the sampling temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.evaluation import pass_at_k
from common.tasks.templates import get_template
from common.verifier import Outcome
from studies.curves import claim
from studies.figures import band, grid
from studies.judges import judge_of
from studies.probing import Analysis, best_template, max_tokens, probe_problems, verdicts
from studies.samplers import Sampler
from studies.study import Budget, Setting, Table
from studies.verdict import Expectation, Row, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("qwen-math", "llama")
TEMPERATURES = tuple(number / 10 for number in range(1, 11))
K, SAMPLES = 8, 16  # twice as many samples as tries: the unbiased estimator averages over all subsets
_QUESTIONS = {Budget.SECONDS: 3, Budget.MINIATURE: 30, Budget.FULL: 500}
_CHOOSING = 30  # questions that choose the template


def _pass(rows: Sequence[Row], model: str, temperature: float | None = None) -> float:
    chosen = [row for row in rows if row["model"] == model]
    return mean([r["pass_at_8"] for r in chosen if temperature is None or r["temperature"] == temperature])


class Exploration(Analysis):
    """See the module."""

    bases = MODELS
    name = "exploration"
    shows = "Figure 3 middle"
    paper = (
        "All base models explore: pass@8 is above 0 at every temperature, so that reinforcement learning has "
        "something to reward. Qwen2.5-Math explores best."
    )
    miniature = (
        "30 held-out questions, 16 responses to each at ten temperatures; pass@8 by the unbiased estimator. Each "
        "model under the template under which it answers most."
    )
    remark = (
        "Unclear only in the last claim: pass@8 rises from temperature 0.1 to 0.7 and falls again towards 1.0, so that "
        "the difference of the two ends is small, and three pretrainings do not tell it from 0.05."
    )
    expectations = (
        Expectation(
            "lowest pass@8 of any model at any temperature",
            claim(lambda rows: min(row["pass_at_8"] for row in rows)),
            0.05,
        ),
        Expectation(
            "pass@8 over all temperatures, qwen-math - llama",
            claim(lambda rows: _pass(rows, "qwen-math") - _pass(rows, "llama")),
            0.0,
        ),
        Expectation(
            "pass@8 of qwen-math, temperature 1.0 - 0.1",
            claim(lambda rows: _pass(rows, "qwen-math", 1.0) - _pass(rows, "qwen-math", 0.1)),
            0.05,
        ),
    )

    def examine(self, sampler: Sampler, setting: Setting, seed: int) -> list[Row]:
        tokens = max_tokens(setting)
        problems = probe_problems(setting, _QUESTIONS[setting.budget])
        chosen = best_template(sampler, problems[:_CHOOSING], judge_of(setting), tokens)
        template = get_template(chosen)
        rows: list[Row] = []
        for temperature in TEMPERATURES:
            found = sampler.sample(
                [problem.text for problem in problems],
                template,
                samples=SAMPLES,
                temperature=temperature,
                max_tokens=tokens,
                seed=seed,
            )
            pairs = [(r, problem) for problem, some in zip(problems, found, strict=True) for r in some]
            outcomes = verdicts(pairs, template, full=setting.full)
            each = [outcomes[start : start + SAMPLES] for start in range(0, len(outcomes), SAMPLES)]
            right = [some.count(Outcome.CORRECT) for some in each]
            rows.append(
                {
                    "template": chosen,
                    "temperature": temperature,
                    "pass_at_8": mean([pass_at_k(SAMPLES, count, K) for count in right]),
                    "pass_at_1": mean([count / SAMPLES for count in right]),
                }
            )
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        models = list(dict.fromkeys((row["model"], row["template"]) for row in rows))
        cells = [("temperature", *(f"{model}, template {template}" for model, template in models))]
        for temperature in TEMPERATURES:
            pairs = [_at(rows, *model, temperature) for model in models]
            texts = [f"{100 * at_8:.1f} / {100 * at_1:.1f}" for at_8, at_1 in pairs]
            cells.append((f"{temperature:.1f}", *texts))
        return [Table("pass@8 / pass@1 (%), mean over seeds", cells)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        (axis,) = grid(figure, 1, 1, (6, 4))
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            chosen = [row for row in rows if row["model"] == model]
            colour = f"C{number}"
            band(axis, chosen, "temperature", "pass_at_8", marker="o", color=colour, label=f"{model}, pass@8")
            band(
                axis,
                chosen,
                "temperature",
                "pass_at_1",
                linestyle=":",
                color=colour,
                label=f"{model}, pass@1",
            )
        axis.set(xlabel="temperature", ylabel="share of questions", ylim=(0, 1.02))
        axis.legend(frameon=False, fontsize="small")


def _at(rows: Sequence[Row], model: str, template: str, temperature: float) -> tuple[float, float]:
    chosen = [
        r for r in rows if (r["model"], r["template"], r["temperature"]) == (model, template, temperature)
    ]
    return mean([row["pass_at_8"] for row in chosen]), mean([row["pass_at_1"] for row in chosen])
