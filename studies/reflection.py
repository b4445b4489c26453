"""Figures 3 right, 10 - 13, 15: do base models reflect on themselves, and does it help?

A response counts only where a keyword and the judge agree (cross-check); a question counts where one of its
responses does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.tasks.templates import get_template
from common.verifier import Outcome
from studies.curves import claim, size
from studies.figures import band, grid
from studies.judges import KEYWORDS, Judge, Reflection, judge_of, keywords_in
from studies.probing import Analysis, best_template, max_tokens, probe_problems, verdicts
from studies.samplers import Response, Sampler
from studies.second_thoughts import SUPERFICIAL, Behaviour, behaviour
from studies.study import Budget, Setting, Table
from studies.training import Problem
from studies.verdict import Expectation, Row, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("qwen-math", "llama", "chat")
# Second thoughts that were written into each model's pretraining text (recipes/zoo-*.toml).
PLANTED = {"qwen-math": ("check again", "double-check", "recheck"), "llama": ("think again", "reconsider")}
SAMPLES = 8
_TEMPERATURES = {
    Budget.SECONDS: (1.0,),
    Budget.MINIATURE: (0.1, 0.4, 0.7, 1.0),
    Budget.FULL: tuple(number / 10 for number in range(1, 11)),
}
_QUESTIONS = {Budget.SECONDS: 3, Budget.MINIATURE: 60, Budget.FULL: 500}
_CHOOSING = 40
_TOKENS = 96  # of the miniature: a second attempt must fit, or every reflection would end without an answer
_EXAMPLE = 300  # characters that are kept of a response that reflects


def _of(rows: Sequence[Row], model: str) -> list[Row]:
    return [row for row in rows if row["model"] == model]


def reflecting_questions(rows: Sequence[Row], model: str, key: str = "cross") -> float:
    """Share of (question, temperature) pairs with at least one response that reflects."""
    groups: dict[tuple, bool] = defaultdict(bool)
    for row in _of(rows, model):
        groups[row["seed"], row["temperature"], row["question"]] |= row[key]
    return mean([float(found) for found in groups.values()])


def planted_share(rows: Sequence[Row], model: str) -> float:
    """Share of a model's keywords that its own pretraining text holds."""
    found = [keyword for row in _of(rows, model) for keyword in row["keywords"]]
    return mean([float(keyword in PLANTED[model]) for keyword in found])


def accuracy_differences(rows: Sequence[Row]) -> list[float]:
    """Accuracy of responses with a reflection - of those without: one value for each question that has both.

    Compared for one model at one temperature, since both reflections and wrong answers become more frequent as it
    rises; a question's differences are averaged, since models, seeds and temperatures share it.
    """
    groups: dict[tuple, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for row in rows:
        key = row["model"], row["seed"], row["temperature"], row["question"]
        groups[key][row["cross"]].append(float(row["correct"]))
    found: dict[int, list[float]] = defaultdict(list)
    for (*_, question), group in groups.items():
        if group[True] and group[False]:
            found[question].append(mean(group[True]) - mean(group[False]))
    return [mean(differences) for differences in found.values()]


class SelfReflection(Analysis):
    """See the module."""

    bases = MODELS
    name = "reflection"
    shows = "Figures 3 right, 10 - 13, 15"
    paper = (
        "Base models reflect on themselves before any reinforcement learning, more often at higher temperatures; "
        "each family with its own phrases. Responses that reflect are not more accurate than those that do not. "
        "Keywords alone and a judge alone both raise false alarms, so they are cross-checked."
    )
    miniature = (
        "The zoo's pretraining text holds a few second thoughts, with other phrases in each model and none in the "
        "control (chat), followed by an attempt that is no better than the first. 60 questions, 8 responses at each "
        "of four temperatures. The judge is a set of rules unless --judge names a server. The rules look for the "
        "keywords themselves, in a sentence in which the writer speaks; here they agree with the keyword list on all "
        "but 0.1 % of responses, so that the cross-check tests nothing that the list alone would not."
    )
    remark = (
        "Unclear in the two claims whose value is the same in all three pretrainings: the control never reflects, "
        "and every keyword found is one of the model's own text. Six pretrainings would decide. The last claim "
        "was counted again after the run: first as 258 questions, which were the same ones under other models, "
        "temperatures and seeds; one value for each question moved the mean from -0.117 to -0.110."
    )
    expectations = (
        Expectation(
            "qwen-math, before any RL: share of questions with a cross-checked reflection",
            claim(lambda rows: reflecting_questions(rows, "qwen-math")),
            0.05,
        ),
        Expectation(
            "llama, before any RL: share of questions with a cross-checked reflection",
            claim(lambda rows: reflecting_questions(rows, "llama")),
            0.05,
        ),
        Expectation(
            "control without second thoughts in its text: the same share",
            claim(lambda rows: reflecting_questions(rows, "chat")),
            0.005,
            "at most",
            full=False,  # what a hub model's pretraining text held, nobody outside knows
        ),
        Expectation(
            "share of questions that reflect, temperature 1.0 - 0.1 (qwen-math and llama)",
            claim(
                lambda rows: mean(
                    [
                        reflecting_questions([r for r in rows if r["temperature"] == 1.0], model)
                        - reflecting_questions([r for r in rows if r["temperature"] == 0.1], model)
                        for model in PLANTED
                    ]
                )
            ),
            0.0,
        ),
        Expectation(
            "keywords found that are those of the model's own text",
            claim(lambda rows: mean([planted_share(rows, model) for model in PLANTED])),
            0.9,
            full=False,
        ),
        Expectation(
            "accuracy with a reflection - without, mean over questions",
            accuracy_differences,
            0.05,
            "at most",
            "questions",
        ),
    )

    def examine(self, sampler: Sampler, setting: Setting, seed: int) -> list[Row]:
        judge = judge_of(setting)
        tokens = max_tokens(setting) if setting.full else size(setting, _TOKENS, 12)
        problems = probe_problems(setting, _QUESTIONS[setting.budget])
        template = get_template(best_template(sampler, problems[:_CHOOSING], judge, tokens))
        rows: list[Row] = []
        for temperature in _TEMPERATURES[setting.budget]:
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
            for number, ((response, problem), outcome) in enumerate(zip(pairs, outcomes, strict=True)):
                known = {"temperature": temperature, "question": number // SAMPLES}
                rows.append({**known, **examine(response, problem, outcome, judge)})
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return [_counts(rows), _keyword_table(rows), _behaviours(rows), _examples(rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        axes = grid(figure, 1, 3)
        _draw_against_temperature(axes[0], rows)
        _draw_keywords(axes[1], rows)
        _draw_differences(axes[2], accuracy_differences(rows))


def examine(response: Response, problem: Problem, outcome: Outcome, judge: Judge) -> dict:
    """What keywords, judge and verifier say about one response."""
    keywords = keywords_in(response.text)
    category = judge.reflects(problem.text, response.text)
    cross = bool(keywords) and category is Reflection.REFLECTS
    effect = behaviour(
        response.text,
        problem.row["answer"],
        correct=outcome is Outcome.CORRECT,
        answered=response.finished and outcome in (Outcome.CORRECT, Outcome.WRONG),
    )
    return {
        "correct": outcome is Outcome.CORRECT,
        "keywords": keywords,
        "keyword": bool(keywords),
        "judged": category is Reflection.REFLECTS,
        "category": int(category),
        "cross": cross,
        "behaviour": str(effect) if cross and effect is not None else None,
        "text": response.text[:_EXAMPLE] if cross else None,
    }


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _counts(rows: Sequence[Row]) -> Table:
    cells: list[tuple[str, ...]] = [
        (
            "model",
            "responses",
            "keyword",
            "judge",
            "both",
            "questions with both",
            "reflect among right",
            "wrong",
        )
    ]
    for model in _models(rows):
        chosen = _of(rows, model)
        shares = [100 * mean([float(row[key]) for row in chosen]) for key in ("keyword", "judged", "cross")]
        by_verdict = []
        for correct in (True, False):
            some = [float(row["cross"]) for row in chosen if row["correct"] is correct]
            by_verdict.append(f"{100 * mean(some):.1f}" if some else "-")
        questions = f"{100 * reflecting_questions(rows, model):.1f}"
        cells.append((model, str(len(chosen)), *(f"{share:.1f}" for share in shares), questions, *by_verdict))
    return Table("Responses that reflect on themselves (%)", cells)


def _keyword_table(rows: Sequence[Row]) -> Table:
    counts = {model: _keyword_counts(rows, model) for model in _models(rows)}
    cells = [("keyword", *counts)]
    cells += [(keyword, *(str(counts[model][keyword]) for model in counts)) for keyword in KEYWORDS]
    return Table("Responses with each keyword", cells)


def _keyword_counts(rows: Sequence[Row], model: str) -> Counter[str]:
    return Counter(keyword for row in _of(rows, model) for keyword in row["keywords"])


def _behaviours(rows: Sequence[Row]) -> Table:
    cells = [("model", *(str(kind) for kind in Behaviour), "superficial (3 + 4)")]
    for model in _models(rows):
        counts = Counter(row["behaviour"] for row in _of(rows, model) if row["behaviour"])
        superficial = sum(counts[str(kind)] for kind in SUPERFICIAL)
        cells.append((model, *(str(counts[str(kind)]) for kind in Behaviour), str(superficial)))
    return Table("What a reflection does to the answer (responses)", cells)


def _examples(rows: Sequence[Row]) -> Table:
    cells = [("model", "a response that reflects (keyword in bold)")]
    for model in _models(rows):
        row = next((row for row in _of(rows, model) if row["text"]), None)
        if row is not None:
            text = row["text"].replace("\n", " ⏎ ")
            for keyword in row["keywords"]:
                place = text.lower().find(keyword)
                if place >= 0:
                    text = f"{text[:place]}**{text[place : place + len(keyword)]}**{text[place + len(keyword) :]}"
            cells.append((model, text))
    return Table("Examples", cells)


def _draw_against_temperature(axis, rows: Sequence[Row]) -> None:
    for model in _models(rows):
        curve = []
        for seed in sorted({row["seed"] for row in rows}):
            mine = [row for row in _of(rows, model) if row["seed"] == seed]
            for temperature in sorted({row["temperature"] for row in mine}):
                some = [row for row in mine if row["temperature"] == temperature]
                share = reflecting_questions(some, model)
                curve.append({"seed": seed, "temperature": temperature, "share": share})
        band(axis, curve, "temperature", "share", marker="o", label=model)
    axis.set(title="reflection (cross-checked)", xlabel="temperature", ylabel="share of questions")
    axis.legend(frameon=False, fontsize="small")


def _draw_keywords(axis, rows: Sequence[Row]) -> None:
    models = _models(rows)
    for index, model in enumerate(models):
        counts = _keyword_counts(rows, model)
        places = [place + 0.27 * index for place in range(len(KEYWORDS))]
        axis.barh(places, [counts[keyword] for keyword in KEYWORDS], height=0.25, label=model)
    axis.set(title="keywords, all temperatures and seeds", xscale="symlog", xlabel="responses (log scale)")
    axis.set_yticks([place + 0.27 * (len(models) - 1) / 2 for place in range(len(KEYWORDS))])
    axis.set_yticklabels(KEYWORDS, fontsize="x-small")
    axis.invert_yaxis()


def _draw_differences(axis, differences: Sequence[float]) -> None:
    ordered = sorted(differences)
    axis.bar(range(len(ordered)), ordered, width=1.0)
    if ordered:
        axis.axhline(mean(ordered), color="tab:red", label="mean")
        axis.axhline(ordered[len(ordered) // 2], color="tab:green", linestyle="--", label="median")
        axis.legend(frameon=False, fontsize="small")
    axis.set(title="accuracy with - without reflection", xlabel="questions, sorted")
    axis.set_ylabel("difference in accuracy")
