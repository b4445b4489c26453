"""Figure 3 left, Table 1: which prompt a base model answers to, and what its pretraining text has to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from common.tasks.templates import Template, get_template
from studies.figures import grid, whiskers
from studies.judges import judge_of
from studies.probing import (
    Analysis,
    accuracy,
    answering_rate,
    benchmark_problems,
    greedy,
    max_tokens,
    probe_problems,
)
from studies.samplers import Response, Sampler
from studies.study import Budget, Setting, Table
from studies.training import Problem
from studies.verdict import Expectation, Row, mean, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("qwen-math", "llama", "chat")
TEMPLATES = ("no", "qwen_math", "few_shot", "r1")
TITLES = {"no": "no template", "qwen_math": "Qwen-Math", "few_shot": "4-shot", "r1": "R1"}
_QUESTIONS = {Budget.SECONDS: 4, Budget.MINIATURE: 100, Budget.FULL: 500}


def _values(rows: Sequence[Row], model: str, template: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["model"] == model and row["template"] == template]


def _value(rows: Sequence[Row], model: str, template: str, key: str) -> float:
    return mean(_values(rows, model, template, key))


def _claim(value: Callable[[Callable[[str, str, str], float]], float]):
    """A measure per seed, written in terms of value(model, template, key)."""
    return lambda rows: per_seed(rows, lambda seed: value(lambda *names: _value(seed, *names)))


def _accuracies(value: Callable[[str, str, str], float], names: Iterable[str]) -> list[float]:
    return [value("qwen-math", name, "accuracy") for name in names]


class Templates(Analysis):
    """See the module."""

    bases = MODELS
    name = "templates"
    shows = "Figure 3 left, Table 1"
    paper = (
        "Qwen2.5-Math answers best without any template (about 60 % above 4-shot prompting), and a mismatched one "
        "destroys it; Llama and DeepSeek base models answer only with a template. The authors suppose that Qwen was "
        "pretrained on concatenated question-answer text, which they could not test."
    )
    miniature = (
        "Three small models that differ in nothing but their pretraining text: bare question-answer text "
        "(qwen-math), running text with exercise lists and a few dialogues (llama), chat template (chat). "
        "Repetitions are pretrainings from other seeds. Greedy answers to 100 held-out questions."
    )
    remark = (
        "Unclear in the factor of 1.3 over 4-shot, since accuracy with 4-shot differs between pretrainings (0.42 "
        "to 0.59) and that without template hardly (0.68 to 0.71); and in the two Answering Rates that are the "
        "same in all three pretrainings, 1 without template for qwen-math and 1 against 0 for llama, which six "
        "pretrainings would decide."
    )
    expectations = (
        Expectation(
            "qwen-math: accuracy without template - best of the other prompts",
            _claim(
                lambda v: (
                    v("qwen-math", "no", "accuracy") - max(_accuracies(v, ("qwen_math", "few_shot", "r1")))
                )
            ),
            0.0,
        ),
        Expectation(
            "qwen-math: accuracy without template - 1.3 x accuracy of 4-shot",
            _claim(lambda v: v("qwen-math", "no", "accuracy") - 1.3 * v("qwen-math", "few_shot", "accuracy")),
            0.0,
        ),
        Expectation(
            "qwen-math: worst of the other prompts - accuracy with R1",
            _claim(
                lambda v: (
                    min(_accuracies(v, ("no", "qwen_math", "few_shot"))) - v("qwen-math", "r1", "accuracy")
                )
            ),
            0.0,
        ),
        Expectation(
            "control, pretrained with a chat template: accuracy with it - without",
            _claim(lambda v: v("chat", "qwen_math", "accuracy") - v("chat", "no", "accuracy")),
            0.1,
        ),
        Expectation(
            "qwen-math: Answering Rate without template",
            _claim(lambda v: v("qwen-math", "no", "answering")),
            0.9,
        ),
        Expectation(
            "llama: Answering Rate with R1 - without template",
            _claim(lambda v: v("llama", "r1", "answering") - v("llama", "no", "answering")),
            0.2,
        ),
        Expectation(
            "Answering Rate without template: lowest of the others - llama",
            _claim(
                lambda v: (
                    min(v("qwen-math", "no", "answering"), v("chat", "no", "answering"))
                    - v("llama", "no", "answering")
                )
            ),
            0.0,
        ),
    )

    def examine(self, sampler: Sampler, setting: Setting, seed: int) -> list[Row]:
        judge, tokens, count = judge_of(setting), max_tokens(setting), _QUESTIONS[setting.budget]
        probed = probe_problems(setting, count)
        benchmarks = benchmark_problems() if setting.full else {}
        rows: list[Row] = []
        for name in TEMPLATES:
            template = get_template(name)
            answers = greedy(sampler, probed, template, tokens)
            sets = {
                of: _accuracy(problems, greedy(sampler, problems, template, tokens), template, setting)
                for of, problems in benchmarks.items()
            } or {"probe": _accuracy(probed, answers, template, setting)}
            rows.append(
                {
                    "template": name,
                    "accuracy": mean(list(sets.values())),  # unweighted over benchmarks, as in the paper
                    "sets": sets,
                    "answering": answering_rate(judge, probed, template, answers),
                    "truncated": sum(not response.finished for response in answers) / len(answers),
                    "example": answers[0].text[:200],
                }
            )
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        tables = []
        for key, title in (("accuracy", "Accuracy (%)"), ("answering", "Answering Rate (%)")):
            cells = [("model", *TEMPLATES)]
            for model in dict.fromkeys(row["model"] for row in rows):
                values = [_value(rows, model, name, key) for name in TEMPLATES]
                cells.append((model, *(f"{100 * value:.1f}" for value in values)))
            tables.append(Table(f"{title}, mean over seeds", cells))
        return tables

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        models = list(dict.fromkeys(row["model"] for row in rows))
        for axis, (key, title) in zip(
            grid(figure, 1, 2),
            (("answering", "Answering Rate"), ("accuracy", "accuracy, greedy")),
            strict=True,
        ):
            for index, name in enumerate(TEMPLATES):
                places = [place + 0.2 * index for place in range(len(models))]
                means, ranges = whiskers([_values(rows, model, name, key) for model in models])
                axis.bar(places, means, width=0.18, yerr=ranges, capsize=2, label=TITLES[name])
            axis.set(title=title, ylabel="share of questions", ylim=(0, 1.05))
            axis.set_xticks([place + 0.3 for place in range(len(models))], models)
        axis.legend(frameon=False, fontsize="small", title="prompt", loc="upper left", bbox_to_anchor=(1, 1))


def _accuracy(
    problems: Sequence[Problem], responses: Sequence[Response], template: Template, setting: Setting
) -> float:
    return accuracy(list(zip(responses, problems, strict=True)), template, full=setting.full)
