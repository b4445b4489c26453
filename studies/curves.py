"""Training curves as the studies of reinforcement learning share them: running, reading and drawing.

Invariant: miniature and full-size runs give rows of the same keys, so that expectations and figures are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.pipeline import run_recipe
from studies.study import Budget, Setting
from studies.training import Run, train
from studies.verdict import Row, mean, per_seed

RUNS = "runs"  # of full-size runs, beside the study's rows
END_SHARE = 0.2  # of the steps that count as the end of a run


def run_curve(
    run: Callable[[], Run], setting: Setting, *, recipe: str, name: str, settings: Mapping[str, Any]
) -> list[Row]:
    """Rows of one run: in this process, or by the pipeline with `recipe` in full size."""
    if setting.full:
        return run_recipe(recipe, name, setting.out / RUNS, settings)
    return train(run())


def size(setting: Setting, miniature: int, seconds: int) -> int:
    """A number of the miniature, or of the tests."""
    return seconds if setting.budget is Budget.SECONDS else miniature


def at_end(rows: Sequence[Row], key: str, **where: Any) -> float:
    """Mean of `key` over the last steps of the training rows that match `where`."""
    chosen = [r for r in rows if r["kind"] == "train" and all(r.get(k) == v for k, v in where.items())]
    last = max((row["step"] for row in chosen), default=0)
    return mean([row.get(key) for row in chosen if row["step"] >= (1 - END_SHARE) * last])


def at_start(rows: Sequence[Row], key: str, **where: Any) -> float:
    """Mean of `key` over as many of the first steps."""
    chosen = [r for r in rows if r["kind"] == "train" and all(r.get(k) == v for k, v in where.items())]
    last = max((row["step"] for row in chosen), default=0)
    return mean([row.get(key) for row in chosen if row["step"] <= END_SHARE * last])


def score(rows: Sequence[Row], step: str = "last", **where: Any) -> float:
    """Held-out accuracy at the `first`, `last` or `best` evaluation of the rows that match `where`."""
    chosen = [r for r in rows if r["kind"] == "eval" and all(r.get(k) == v for k, v in where.items())]
    curve = sorted((row["step"], row["score"]) for row in chosen if row["score"] is not None)
    if not curve:
        raise ValueError("there is no evaluation")
    if step == "best":
        return max(value for _, value in curve)
    wanted = curve[0 if step == "first" else -1][0]
    return mean([value for at, value in curve if at == wanted])


def claim(value: Callable[[Sequence[Row]], float]) -> Callable[[Sequence[Row]], list[float]]:
    """A measure with one value per seed."""
    return lambda rows: per_seed(rows, value)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range over seeds as text."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{sum(known) / len(known):.{digits}f} ({min(known):.{digits}f} - {max(known):.{digits}f})"
