"""Ours: how old may the data be? Reward, effective sample size and clipping against staleness, with corrections.

The miniature trains every batch exactly `max_staleness` versions after it was sampled, the oldest that admission
lets through (see `studies.training`): a harder test than a pipeline that keeps up. Wall-clock time cannot be had
that way, so it is measured on the pipeline itself, synchronous (max_staleness 0) against asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from studies.curves import RUNS, at_end, claim, run_curve, score, size, spread
from studies.figures import grid
from studies.pipeline import run_recipe
from studies.probing import as_problems
from studies.questions import held_out, training_set
from studies.study import Budget, Setting, Study, Table, Unit
from studies.training import Run
from studies.verdict import Expectation, Row, mean, per_seed
from studies.zoo import where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL = "qwen-math"
NONE = "dr_grpo"
STALENESS = (0, 1, 2, 4, 8, 16)
CORRECTIONS = (
    NONE,
    "dr_grpo_dual_clip",
    "dr_grpo_tis",
    "dr_grpo_icepop",
    "dr_grpo_sequence_mask",
    "dr_grpo_geometric_mask",
    "dr_grpo_m2po",
)
CLOCKS = {"synchronous": 0, "asynchronous": 2}  # name -> max_staleness
_CLOCK_RECIPE = "demo"
_CLOCK_STEPS = 30


def _combinations(setting: Setting) -> list[tuple[str, int]]:
    """(correction, staleness): every staleness without correction, every correction where data are old."""
    if setting.budget is Budget.SECONDS:
        return [(NONE, 0), ("dr_grpo_tis", 2), ("dr_grpo_m2po", 2)]
    corrected = CORRECTIONS[1:]
    old = STALENESS if setting.full else (16,)
    return [*((NONE, age) for age in STALENESS), *((name, age) for age in old for name in corrected)]


def _end(rows: Sequence[Row], key: str, staleness: int, correction: str = NONE) -> float:
    return at_end(rows, key, staleness=staleness, correction=correction)


def _seconds(rows: Sequence[Row], clock: str) -> float:
    return mean([row["seconds"] for row in rows if row["kind"] == "clock" and row.get("clock") == clock])


class Staleness(Study):
    """See the module."""

    name = "staleness"
    shows = "nothing in the paper, which trains synchronously: this is what Slipstream adds"
    paper = "The paper's runs are synchronous; whether asynchronous ones learn as well is ours to show."
    miniature = (
        "The qwen-math model, Dr. GRPO, 40 steps, every batch trained exactly 0, 1, 2, 4, 8 or 16 versions after "
        "it was sampled; six corrections at 16. Wall-clock: the demo's pipeline for 30 steps, max_staleness 0 and 2."
    )
    expectations = (
        Expectation(
            "effective sample size at the end, staleness 1 - 16, no correction",
            claim(lambda rows: _end(rows, "ratio_ess", 1) - _end(rows, "ratio_ess", 16)),
            0.02,
        ),
        Expectation(
            "share of clipped tokens at the end, staleness 16 - 1, no correction",
            claim(
                lambda rows: sum(
                    _end(rows, key, 16) - _end(rows, key, 1) for key in ("clip_low_mean", "clip_high_mean")
                )
            ),
            0.0,
        ),
        Expectation(
            "reward at the end, staleness 2 - 0, no correction",
            claim(lambda rows: _end(rows, "reward", 2) - _end(rows, "reward", 0)),
            -0.05,
        ),
        Expectation(
            "reward at the end, staleness 16: best correction - none",
            claim(
                lambda rows: (
                    max(_end(rows, "reward", 16, name) for name in CORRECTIONS[1:]) - _end(rows, "reward", 16)
                )
            ),
            0.0,
        ),
        Expectation(
            "wall-clock seconds on the pipeline, synchronous / asynchronous",
            claim(lambda rows: _seconds(rows, "synchronous") / _seconds(rows, "asynchronous")),
            1.2,
        ),
    )

    def models(self, setting: Setting) -> list[tuple[str, int]]:
        return [(MODEL, 0)]

    def units(self, setting: Setting) -> list[Unit]:
        runs = [
            Unit(f"{name}/{age}/seed-{seed}", {"correction": name, "staleness": age, "seed": seed})
            for seed in setting.seeds
            for name, age in _combinations(setting)
        ]
        if setting.budget is Budget.SECONDS:  # the pipeline has its own tests
            return runs
        clocks = [
            Unit(f"{clock}/seed-{seed}", {"clock": clock, "seed": seed}, alone=True)
            for seed in setting.seeds
            for clock in CLOCKS
        ]
        return [*runs, *clocks]

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        if "clock" in unit.arguments:
            return _clock_rows(unit.arguments["clock"], unit.arguments["seed"], setting)
        name, age, seed = (unit.arguments[key] for key in ("correction", "staleness", "seed"))
        rows = run_curve(
            lambda: _mini_run(name, age, seed, setting),
            setting,
            recipe="paper-1.5b-qwen",
            name=f"{name}-staleness-{age}-seed-{seed}",
            settings={"run.seed": seed, "algorithm.preset": name, "batch.max_staleness": age},
        )
        return [{"correction": name, "staleness": age, "seed": seed, **row} for row in rows]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells = [
            ("correction", "max_staleness", "reward", "accuracy", "ESS", "clipped low", "clipped high", "KL")
        ]
        done = dict.fromkeys((r["correction"], r["staleness"]) for r in rows if "correction" in r)
        for name, age in done:
            keys = ("ratio_ess", "clip_low_mean", "clip_high_mean", "kl_behaviour_mean")
            where_ = {"correction": name, "staleness": age}
            texts = [spread(per_seed(rows, lambda s, w=where_: at_end(s, "reward", **w)))]
            texts.append(spread(per_seed(rows, lambda s, w=where_: score(s, **w))))
            texts += [spread(per_seed(rows, lambda s, w=where_, k=key: at_end(s, k, **w)), 3) for key in keys]
            cells.append((name, str(age), *texts))
        return [Table("At the end of training: mean (range) over seeds", cells), _clock_table(rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        titles = {
            "reward": "reward at the end",
            "ratio_ess": "effective sample size",
            "clip_low_mean": "clipped low",
        }
        for axis, (key, title) in zip(grid(figure, 1, 3), titles.items(), strict=True):
            for name in dict.fromkeys(row["correction"] for row in rows if "correction" in row):
                ages = sorted({row["staleness"] for row in rows if row.get("correction") == name})
                means = [_mean_end(rows, key, age, name) for age in ages]
                style = {"color": "black"} if name == NONE else {}
                axis.plot(ages, means, marker="o", label=name, **style)
            axis.set(title=title, xlabel="staleness (versions)", xscale="symlog", xticks=STALENESS)
            axis.set_xticklabels(STALENESS)
        axis.legend(frameon=False, fontsize="x-small")


def _mean_end(rows: Sequence[Row], key: str, staleness: int, correction: str) -> float:
    known = [v for v in per_seed(rows, lambda s: _end(s, key, staleness, correction)) if v == v]
    return mean(known) if known else float("nan")


def _clock_rows(clock: str, seed: int, setting: Setting) -> list[Row]:
    """The pipeline's own time for a number of steps; nothing else may run beside it."""
    settings = {"run.seed": seed, "batch.max_staleness": CLOCKS[clock], "eval.sets": []}
    recipe = "paper-1.5b-qwen" if setting.full else _CLOCK_RECIPE
    settings["run.steps"] = _CLOCK_STEPS
    rows = run_recipe(recipe, f"clock-{clock}-seed-{seed}", setting.out / RUNS, settings)
    return [{"clock": clock, "seed": seed, **row} for row in rows if row["kind"] == "clock"]


def _clock_table(rows: Sequence[Row]) -> Table:
    cells = [("pipeline", "seconds", "learner idle", "staleness, mean")]
    for clock in CLOCKS:
        mine = [row for row in rows if row["kind"] == "clock" and row.get("clock") == clock]
        values = [[row[key] for row in mine if row[key] is not None] for key in _CLOCK_KEYS]
        cells.append((clock, *(spread(found) for found in values)))
    return Table(f"Wall-clock for {_CLOCK_STEPS} steps: mean (range) over seeds", cells)


_CLOCK_KEYS = ("seconds", "learner_idle_share", "staleness_mean")


def _mini_run(correction: str, staleness: int, seed: int, setting: Setting) -> Run:
    return Run(
        model=where(MODEL, 0, setting),
        problems=as_problems(training_set("orz", size(setting, 800, 8), seed)),
        held_out=as_problems(held_out(size(setting, 80, 4))),
        algorithm=correction,
        template="no",
        steps=size(setting, 40, 4),
        questions=size(setting, 16, 4),
        group=size(setting, 8, 2),
        max_tokens=size(setting, 48, 8),
        staleness=staleness,
        eval_every=20,
        seed=seed,
    )
