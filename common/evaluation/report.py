"""From answers to a table: per set and on average, with confidence intervals.

Invariant: accuracy is the mean over questions of the share of correct responses (pass@1), so sets with several
responses per question stay unbiased; the average over sets is unweighted (paper section 3.4). Lengths are in
tokens; shares are of responses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.evaluation.answers import Answer, Response
from common.evaluation.metrics import Interval, bootstrap, pass_at_k, stratified_bootstrap


@dataclass(frozen=True)
class SetResult:
    """One question set.

    Attributes:
        name: of the set.
        questions: answered.
        samples: responses per question.
        accuracy: pass@1 with its confidence interval.
        pass_at: k to pass@k, for k = 1, 2, 4, ... up to `samples`.
        tokens_mean, tokens_max: response length.
        formatted, truncated, unverified: shares of responses.
    """

    name: str
    questions: int
    samples: int
    accuracy: Interval
    pass_at: Mapping[int, float]
    tokens_mean: float
    tokens_max: int
    formatted: float
    truncated: float
    unverified: float


@dataclass(frozen=True)
class Report:
    """All sets of an evaluation, and their unweighted average accuracy."""

    sets: tuple[SetResult, ...]
    average: Interval

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        rows = {result.name: _plain(result) for result in self.sets}
        return {"average": self.average._asdict(), "sets": rows}

    def metrics(self) -> dict[str, float]:
        """Names in the tracker, below `eval/`: `SET/accuracy`, `SET/pass_at_8`, ..., and `average`."""
        flat = {"average": self.average.mean}
        for result in self.sets:
            name = short_name(result.name)
            flat[f"{name}/accuracy"] = result.accuracy.mean
            flat |= {f"{name}/pass_at_{k}": value for k, value in result.pass_at.items() if k > 1}
            for meter in ("tokens_mean", "formatted", "truncated", "unverified"):
                flat[f"{name}/{meter}"] = float(getattr(result, meter))
        return flat

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, header first, average last."""
        ks = sorted({k for result in self.sets for k in result.pass_at if k > 1})
        header = ("set", "n", "accuracy", "95 %", *(f"pass@{k}" for k in ks))
        lines = [(*header, "tokens", "longest", "formatted", "truncated", "unverified")]
        lines += [_text_row(result, ks) for result in self.sets]
        bounds = f"{100 * self.average.low:.1f}-{100 * self.average.high:.1f}"
        blank = ("",) * (len(ks) + 5)
        lines.append(
            ("average", str(_questions(self.sets)), f"{100 * self.average.mean:.1f}", bounds, *blank)
        )
        return lines

    def markdown(self) -> str:
        """The table in Markdown."""
        header, *rows = self.rows()
        rule = tuple("---" if index == 0 else "---:" for index in range(len(header)))
        return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *rows))


def summarise(answers: Iterable[Answer], *, seed: int = 0, resamples: int = 10_000) -> Report:
    """The report of `answers`, sets in order of appearance.

    Raises:
        ValueError: there are no answers.
    """
    by_set: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_set[answer.set].append(answer)
    if not by_set:
        raise ValueError("there are no answers to report on")
    # Answers arrive in any order; the interval must not depend on it.
    ordered = {name: sorted(group, key=lambda a: a.uid) for name, group in by_set.items()}
    shares = [[_share(answer) for answer in group] for group in ordered.values()]
    results = tuple(_set_result(name, group, seed, resamples) for name, group in ordered.items())
    return Report(results, stratified_bootstrap(shares, seed=seed, resamples=resamples))


def _set_result(name: str, group: Sequence[Answer], seed: int, resamples: int) -> SetResult:
    responses = [response for answer in group for response in answer.responses]
    samples = min(len(answer.responses) for answer in group)
    lengths = [response.tokens for response in responses]
    return SetResult(
        name=name,
        questions=len(group),
        samples=samples,
        accuracy=bootstrap([_share(answer) for answer in group], seed=seed, resamples=resamples),
        pass_at={k: _mean(_pass_at(answer, k) for answer in group) for k in _powers_of_two(samples)},
        tokens_mean=_mean(lengths),
        tokens_max=max(lengths),
        formatted=_mean(response.extracted is not None for response in responses),
        truncated=_mean(response.finish == "length" for response in responses),
        unverified=_mean(response.verdict == "unverified" for response in responses),
    )


def short_name(name: str) -> str:
    """A set's name for tables and trackers: of a file or folder its stem, of a hub id its last part."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem if "/" in name else name)


def is_correct(response: Response) -> bool:
    """Whether a response counts as right."""
    return response.verdict == "correct"


def _share(answer: Answer) -> float:
    return _mean(is_correct(response) for response in answer.responses)


def _pass_at(answer: Answer, k: int) -> float:
    correct = sum(is_correct(response) for response in answer.responses)
    return pass_at_k(len(answer.responses), correct, k)


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... and `limit` itself."""
    return sorted({limit, *(1 << e for e in range(limit.bit_length()) if 1 << e <= limit)})


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(sum(values)) / len(values)


def _questions(results: Iterable[SetResult]) -> int:
    return sum(result.questions for result in results)


def _text_row(result: SetResult, ks: Sequence[int]) -> tuple[str, ...]:
    low, high = (f"{100 * bound:.1f}" for bound in result.accuracy[1:])
    passes = tuple(f"{100 * result.pass_at[k]:.1f}" if k in result.pass_at else "" for k in ks)
    shares = (result.formatted, result.truncated, result.unverified)
    return (
        short_name(result.name),
        str(result.questions),
        f"{100 * result.accuracy.mean:.1f}",
        f"{low}-{high}",
        *passes,
        f"{result.tokens_mean:.1f}",
        str(result.tokens_max),
        *(f"{100 * share:.1f}" for share in shares),
    )


def _plain(result: SetResult) -> dict[str, Any]:
    plain = {name: getattr(result, name) for name in SetResult.__dataclass_fields__ if name != "name"}
    plain["accuracy"] = result.accuracy._asdict()
    plain["pass_at"] = {str(k): value for k, value in result.pass_at.items()}
    return plain
