"""Questions, verdicts and templates for the analysis of base models.

Invariant: a model is analysed under the template under which it answers most often, chosen by one rule for all
models (paper, section 2.1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from common.tasks.sets import BENCHMARKS, load_questions
from common.tasks.templates import Template, get_template
from common.verifier import Level, Outcome, VerifierPool, grade
from studies.judges import Judge
from studies.questions import held_out
from studies.samplers import Response, Sampler, sampler_of
from studies.study import Setting, Study, Unit
from studies.training import Problem
from studies.verdict import Row

CANDIDATES = ("no", "r1", "qwen_math")
MINIATURE_TOKENS = 48
FULL_TOKENS = 3000
LEVELS = (1, 2, 3, 4, 5)  # of MATH


class Analysis(Study):
    """A study that samples base models: one unit for each model and pretraining seed, or for the served model.

    A model of the hub has no pretraining seeds: it is analysed once, and a claim about it has one repetition.

    Attributes:
        bases: names in the zoo.
    """

    bases: ClassVar[tuple[str, ...]]

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        seeds = setting.seeds[:1] if setting.full else setting.seeds
        return [(base, seed) for seed in seeds for base in self.bases]

    def units(self, setting: Setting) -> list[Unit]:
        models = [(setting.endpoint_model, 0)] if setting.endpoint else self.models(setting)
        return [Unit(f"{model}/seed-{seed}", {"model": model, "seed": seed}) for model, seed in models]

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        sampler = sampler_of(unit.arguments["model"], unit.arguments["seed"], setting)
        rows = self.examine(sampler, setting, unit.arguments["seed"])
        return [{**unit.arguments, **row} for row in rows]

    @abstractmethod
    def examine(self, sampler: Sampler, setting: Setting, seed: int) -> list[Row]:
        """Rows of one model, without its name and seed."""


def max_tokens(setting: Setting) -> int:
    """Generation budget of an analysis."""
    return FULL_TOKENS if setting.full else MINIATURE_TOKENS


def probe_problems(setting: Setting, count: int) -> list[Problem]:
    """`count` questions to probe with: held out in the miniature, MATH's training set in full size, where each of the
    five levels has as many (the paper: 100 of each), in turn."""
    if not setting.full:
        return as_problems(held_out(count))
    levels = [load_questions("math_12k", levels=[level], limit=count // len(LEVELS)) for level in LEVELS]
    return [Problem(row["problem"], row) for rows in zip(*levels, strict=True) for row in rows]


def benchmark_problems() -> dict[str, list[Problem]]:
    """The paper's five benchmarks by name."""
    return {name: [Problem(row["problem"], row) for row in load_questions(name)] for name in BENCHMARKS}


def as_problems(questions: Sequence) -> list[Problem]:
    """MiniMath questions as the studies pass them on."""
    return [Problem(question.problem, asdict(question)) for question in questions]


def verdicts(
    pairs: Sequence[tuple[Response, Problem]], template: Template, *, full: bool, level: Level = "full"
) -> list[Outcome]:
    """The verifier's word on each response.

    Args:
        pairs: responses, each with its question.
        template: under which they were sampled.
        full: as the paper's evaluation, with the verifier of `level`; a response cut at the budget is graded like any
            other. In the miniature level `fast`, and such a response is `truncated`.
        level: of the verifier in full size; Table 1 has `full`.
    """
    if not full:
        return [_verdict(response, problem, template) for response, problem in pairs]
    texts = ((response.text, problem.row["answer"]) for response, problem in pairs)
    with VerifierPool(level=level, template=template.extraction) as pool:  # which ends what takes too long
        return [found.verdict for found in pool.grade_many(texts)]


def _verdict(response: Response, problem: Problem, template: Template) -> Outcome:
    if not response.finished:
        return Outcome.TRUNCATED
    return grade(response.text, problem.row["answer"], template=template.extraction).verdict


def accuracy(pairs: Sequence[tuple[Response, Problem]], template: Template, **how: Any) -> float:
    """Share of responses that are correct; `how` goes to `verdicts`."""
    found = verdicts(pairs, template, **how)
    return sum(outcome is Outcome.CORRECT for outcome in found) / len(found)


def greedy(sampler: Sampler, problems: Sequence[Problem], template: Template, tokens: int) -> list[Response]:
    """One greedy response to each question."""
    questions = [problem.text for problem in problems]
    found = sampler.sample(questions, template, samples=1, temperature=0.0, max_tokens=tokens)
    return [responses[0] for responses in found]


def answering_rate(
    judge: Judge, problems: Sequence[Problem], template: Template, responses: Sequence[Response]
) -> float:
    """Share of responses that answer their question; one that the judge cannot tell does not count."""
    pairs = zip(problems, responses, strict=True)
    judged = [judge.answers(template.render(problem.text), response.text) for problem, response in pairs]
    return sum(answer is True for answer in judged) / len(judged)


def best_template(sampler: Sampler, problems: Sequence[Problem], judge: Judge, tokens: int) -> str:
    """The candidate with the highest Answering Rate; without a template where that is as good."""
    rates = {}
    for name in CANDIDATES:
        template = get_template(name)
        rates[name] = answering_rate(judge, problems, template, greedy(sampler, problems, template, tokens))
    return max(CANDIDATES, key=lambda name: rates[name])
