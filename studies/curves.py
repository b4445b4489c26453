"""Training curves as the studies of reinforcement learning share them: running and reading.

Invariant: miniature and full-size runs give rows of the same keys, so that expectations and figures are the same;
every row carries the arguments of its unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from studies.pipeline import run_recipe
from studies.probing import as_problems
from studies.questions import held_out, training_set
from studies.study import Budget, Setting, Unit
from studies.training import Run, train
from studies.verdict import Row, mean, per_seed
from studies.zoo import where

RUNS = "runs"  # of full-size runs, beside the study's rows
END_SHARE = 0.2  # of the steps that count as the end of a run


def run_curve(
    unit: Unit,
    setting: Setting,
    run: Callable[[], Run],
    *,
    recipe: str,
    settings: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Rows of a unit's run: in this process, or by the pipeline with `recipe` and `settings` in full size."""
    if setting.full:
        chosen = {"run.seed": unit.arguments["seed"], **(settings or {})}
        rows = run_recipe(recipe, unit.key.replace("/", "-"), setting.out / RUNS, chosen)
    else:
        rows = train(run())
    return [{**unit.arguments, **row} for row in rows]


def units_of(setting: Setting, runs: Iterable[Mapping[str, Any]]) -> list[Unit]:
    """One unit for each seed and run; the values that tell runs apart, and the seed, name it."""
    each = list(runs)
    return [
        Unit("/".join([*map(str, names.values()), f"seed-{seed}"]), {**names, "seed": seed})
        for seed in setting.seeds
        for names in each
    ]


def small_run(
    setting: Setting,
    model: str,
    *,
    seed: int,
    training: str = "orz",
    problems: int = 800,
    tested: int = 80,
    **changes: Any,
) -> Run:
    """A miniature run on MiniMath; on the tests' budget the same with next to nothing of everything.

    Args:
        setting: of the study.
        model: name in the zoo; the base is that of seed 0 in every run.
        seed: of questions and sampling.
        training: name of the question set.
        problems, tested: how many questions to train on, and to answer greedily.
        changes: further fields of `Run`.
    """
    if setting.budget is Budget.SECONDS:
        problems, tested = 16, 4
        changes |= {"steps": 4, "questions": 4, "group": 4, "max_tokens": 12}
    return Run(
        model=where(model, 0, setting),
        problems=as_problems(training_set(training, problems, seed)),
        held_out=as_problems(held_out(tested)),
        seed=seed,
        **changes,
    )


def size(setting: Setting, miniature: int, seconds: int) -> int:
    """A number of the miniature, or of the tests."""
    return seconds if setting.budget is Budget.SECONDS else miniature


def at_end(rows: Sequence[Row], key: str, **where: Any) -> float:
    """Mean of `key` over the last steps of the training rows that match `where`."""
    chosen = [r for r in rows if r["kind"] == "train" and all(r.get(k) == v for k, v in where.items())]
    last = max((row["step"] for row in chosen), default=0)
    return mean([row.get(key) for row in chosen if row["step"] >= (1 - END_SHARE) * last])


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


def of_base(value: Callable[[Sequence[Row]], float]) -> Callable[[Sequence[Row]], list[float]]:
    """A measure of the base models before training: all seeds start from the same ones and answer the same questions
    greedily, so that it is one number, whatever the number of seeds."""
    return lambda rows: per_seed(rows, value)[:1]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range over seeds as text."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{sum(known) / len(known):.{digits}f} ({min(known):.{digits}f} - {max(known):.{digits}f})"
