"""What held-out evaluations found: shares and lengths, by set and over all.

Invariant: a share has the answers that it is of as its denominator, and a figure without any is left out, never 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from common.evaluation.report import short_name
from common.messages import EvalRow, Scored
from common.tracking.catalogue import plain


def metrics_of(rows: Iterable[EvalRow]) -> dict[str, float]:
    """Shares and lengths over all sets, and per set as `SET/name`.

    Over all sets `pass1` and `greedy` are means in which each set counts once, however many questions it has (the
    paper's average over benchmarks, Table 4); the other figures are over all answers. `pass1` is the share of correct
    answers among the sampled ones (temperature of the recipe), `greedy` among the greedy ones; `unformatted`,
    `truncated` and `unverified` are shares of the sampled answers; lengths in tokens, by verdict.
    """
    by_set: dict[str, list[EvalRow]] = defaultdict(list)
    for row in rows:
        by_set[row.set].append(row)
    everything = [row for group in by_set.values() for row in group]
    of_sets = {name: _shares(group) for name, group in sorted(by_set.items())}
    metrics = _shares(everything)
    for key in metrics.keys() & {"greedy", "pass1"}:
        metrics[key] = fmean(found[key] for found in of_sets.values() if key in found)
    names = _names(by_set)
    for name, found in of_sets.items():
        metrics.update({f"{names[name]}/{key}": value for key, value in found.items()})
    return metrics


def _names(sets: Iterable[str]) -> dict[str, str]:
    """Short names of sets for metrics; where two would be equal, the whole ones."""
    short = {name: short_name(name) for name in sets}
    uses = Counter(short.values())
    return {name: found if uses[found] == 1 else plain(name) for name, found in short.items()}


def _shares(rows: Sequence[EvalRow]) -> dict[str, float]:
    greedy = [row.greedy for row in rows]
    sampled = [answer for row in rows for answer in row.sampled]
    metrics = {"questions": float(len(rows))}
    if greedy:
        metrics["greedy"] = _share(greedy, "correct")
        metrics["greedy_length"] = _length(greedy)
    if sampled:
        metrics["pass1"] = _share(sampled, "correct")
        metrics["length"] = _length(sampled)
        for verdict in ("unformatted", "truncated", "unverified"):
            metrics[verdict] = _share(sampled, verdict)
        for name, answers in _by_correctness(sampled):
            if answers:
                metrics[f"length_{name}"] = _length(answers)
    return metrics


def _by_correctness(answers: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    correct = [answer for answer in answers if answer.verdict == "correct"]
    return [("correct", correct), ("incorrect", [a for a in answers if a.verdict != "correct"])]


def _share(answers: Sequence[Scored], verdict: str) -> float:
    return sum(answer.verdict == verdict for answer in answers) / len(answers)


def _length(answers: Sequence[Scored]) -> float:
    return sum(answer.tokens for answer in answers) / len(answers)
