"""Rates and workload of recorded runs, from their folders alone.

Invariant: everything comes from the runs' own points (`metrics.jsonl`) and journals. What the learner does is read
off directly. How fast an engine decodes is not in the points: it is the pair (decode_s, sequence_s) with which the
simulation of the very same recipes reproduces what was recorded: the time of a step and, where a run kept its
groups (`broker.record = true`), the time of a group in the engine. How much learner and actor slow each other down
on one machine shows only in two runs that overlap them differently, such as a synchronous and an asynchronous one.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from broker.journal import Journal
from broker.meters import EDGES
from broker.state import rules_of
from common.errors import UserError
from common.messages import GroupHeader
from common.recipe.schema import Recipe
from common.run_files import JOURNAL_FOLDER, LEDGER_FILE
from deploy.folder import find_folder, read_recipe
from deploy.planning.rates import Rates
from deploy.planning.simulate import simulate
from deploy.planning.workload import LogNormal, Recorded, Workload
from deploy.report import WARM_UP_STEPS, Points, read_points

SETTING = "--from"
FEWEST_STEPS = WARM_UP_STEPS + 3
# A prompt token goes through the model like any other but needs no step of its own, no sampling and no record.
PROMPT_SHARE = 0.1
ASSUMED_HALF_RATE = 64  # sequences at which a decode step takes twice its floor, where nothing recorded tells
FIT_STEPS = 20
SURE = 3.0
BUSY = 0.02  # share of waiting under which the learner hides how fast the actors could be


@dataclass(frozen=True)
class Figures:
    """What a run did after its warm-up; the quantities that `Outcome` predicts.

    `group_s` is the mean time from a group's lease to its last token in seconds, None where no group was kept.
    """

    step_s: float
    training_s: float
    learner_idle: float
    staleness_mean: float
    tokens_s: float
    group_s: float | None = None


@dataclass(frozen=True)
class Recording:
    """One run: its recipe, workload, the rates that can be read off, what it did, and in how many steps."""

    recipe: Recipe
    workload: Workload
    rates: Rates
    measured: Figures
    steps: int


@dataclass(frozen=True)
class Calibration:
    """Rates and workload (of the first run), the runs that they were read from, and remarks on how."""

    rates: Rates
    workload: Workload
    runs: tuple[Recording, ...]
    notes: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """Of the first run."""
        return self.runs[0].recipe


def calibrate(*runs: str | Path) -> Calibration:
    """Read the rates of runs on the same machines.

    Args:
        runs: run folders, or names below ./runs; at least one.

    Raises:
        UserError: no such run, too few steps, or nothing in them tells how fast their actors are.
    """
    recordings = tuple(read_recording(find_folder(str(run))) for run in runs)
    if all(r.measured.group_s is None and r.measured.learner_idle < BUSY for r in recordings):
        raise UserError(
            "the learner of this run never waited, so that nothing tells how fast its actors are: record one with "
            "broker.record = true, or give --actor-rate.",
            setting=SETTING,
        )
    rates, notes = _fit(recordings)
    return Calibration(rates, recordings[0].workload, recordings, notes)


def read_recording(folder: Path) -> Recording:
    """Everything about the run in `folder` that needs no simulation."""
    recipe, points = read_recipe(folder), read_points(folder)
    steps = len(points.values("learner", "seconds_training"))
    if steps < FEWEST_STEPS:
        raise UserError(
            f"'{folder}' has {steps} committed steps; at least {FEWEST_STEPS} are needed to read rates from.",
            setting=SETTING,
        )
    headers = _headers(folder, recipe)
    return Recording(
        recipe,
        _workload(recipe, points, headers, folder),
        _learner_rates(points, headers),
        measured_figures(folder, headers),
        steps,
    )


def measured_figures(folder: Path, headers: Sequence[GroupHeader] | None = None) -> Figures:
    """What the run in `folder` did after its warm-up."""
    points = read_points(folder)
    headers = _headers(folder, read_recipe(folder)) if headers is None else headers
    names = ("waiting", "training", "publishing", "checkpointing")
    parts = [points.values("learner", f"seconds_{name}", after=WARM_UP_STEPS + 1) for name in names]
    seconds, steps = sum(map(sum, parts)), len(parts[0])
    tokens = _trained_and_filtered(points, read_recipe(folder))
    times = [header.generate_s for header in headers if header.generate_s]
    return Figures(
        step_s=seconds / steps,
        training_s=sum(parts[1]) / steps,
        learner_idle=sum(parts[0]) / seconds,
        staleness_mean=_staleness(points),
        tokens_s=tokens * steps / seconds,
        group_s=fmean(times) if times else None,
    )


def _trained_and_filtered(points: Points, recipe: Recipe) -> float:
    """Response tokens that a step consumes, filtered ones taken to be as long as the trained ones."""
    lengths = points.values("learner", "length", after=WARM_UP_STEPS + 1)
    return fmean(lengths) * recipe.responses_per_step


def _staleness(points: Points) -> float:
    """Versions, mean over the trained tokens after the warm-up."""
    lags = points.values("learner", "staleness_mean", after=WARM_UP_STEPS + 1)
    tokens = points.values("learner", "tokens", after=WARM_UP_STEPS + 1)
    return sum(lag * count for lag, count in zip(lags, tokens, strict=True)) / sum(tokens)


# --- what is read off directly ------------------------------------------------------------------------------


def _headers(folder: Path, recipe: Recipe) -> list[GroupHeader]:
    """Headers of the groups that the journal still holds."""
    if not (folder / JOURNAL_FOLDER / LEDGER_FILE).exists():
        return []
    try:
        journal = Journal(folder / JOURNAL_FOLDER, read_only=True)
        ledger = journal.load(rules_of(recipe, 1))
        keys = [] if ledger is None else [key for key in ledger.groups if journal.kept(key)]
        found = [entry.header for key in keys if (entry := journal.get(key)) is not None]
        journal.close()
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"the journal in '{folder}' cannot be read: {error}.", setting=SETTING) from None
    return found


def _workload(recipe: Recipe, points: Points, headers: Sequence[GroupHeader], folder: Path) -> Workload:
    filtered = points.values("learner", "filtered_share", after=WARM_UP_STEPS)
    return Workload(
        lengths=_lengths(recipe, points, headers, folder),
        prompt_tokens=_prompt_tokens(recipe, points, headers),
        filtered_share=fmean(filtered) if filtered else 0.0,
        eval_sequences=_eval_sequences(recipe, points),
    )


def _lengths(
    recipe: Recipe, points: Points, headers: Sequence[GroupHeader], folder: Path
) -> Recorded | LogNormal:
    longest = recipe.rollout.max_tokens
    if headers:
        return Recorded([tuple(r.tokens for r in header.responses) for header in headers], longest)
    histogram = _histogram(folder)
    if histogram is not None and any(histogram):
        return Recorded(_spread_out(histogram, longest), longest)
    return LogNormal(fmean(points.values("learner", "length")), longest)


def _histogram(folder: Path) -> list[int] | None:
    """Lengths of all sampled responses, counted in the buckets of `broker.meters`."""
    try:
        journal = Journal(folder / JOURNAL_FOLDER, read_only=True)
        extra: Mapping[str, Any] | None = journal.meta("extra")
        journal.close()
    except (sqlite3.Error, OSError):
        return None
    return None if extra is None else extra["meters"]["lengths"]["sampled"][3]


def _spread_out(histogram: Sequence[int], longest: int) -> list[tuple[int, ...]]:
    """About a thousand lengths with that histogram, even within each bucket."""
    lower = [1, *EDGES]
    total = sum(histogram)
    lengths: list[int] = []
    for low, high, count in zip(lower, [*EDGES, longest], histogram, strict=False):
        places = round(1000 * count / total) or int(count > 0)
        lengths += np.linspace(low, min(high, longest), places + 2)[1:-1].round().astype(int).tolist()
    return [(length,) for length in lengths]


def _prompt_tokens(recipe: Recipe, points: Points, headers: Sequence[GroupHeader]) -> float:
    """From the groups, or from the learner: it trains on prompt and response and counts both."""
    if headers:
        return fmean(header.prompt_tokens for header in headers)
    rates = points.values("learner", "tokens_per_s")
    seconds = points.values("learner", "seconds_training")
    responses = points.values("learner", "tokens")
    lengths = points.values("learner", "length")
    trained = sum(rate * time for rate, time in zip(rates, seconds, strict=True)) / recipe.algorithm.epochs
    count = sum(tokens / length for tokens, length in zip(responses, lengths, strict=True))
    return max(1.0, (trained - sum(responses)) / max(1.0, count))


def _eval_sequences(recipe: Recipe, points: Points) -> int:
    asked = points.values("eval", "questions")
    return round(asked[-1]) * (1 + recipe.eval.samples) if asked else 0


def _learner_rates(points: Points, headers: Sequence[GroupHeader]) -> Rates:
    """Everything but the engine's speed, which is left at a nanosecond."""
    seconds = np.array(points.values("learner", "seconds_training", after=WARM_UP_STEPS))
    rate = np.array(points.values("learner", "tokens_per_s", after=WARM_UP_STEPS))
    fixed, per_token = line_through(rate * seconds, seconds)
    stopped = points.values("learner", "push_stopped_ms", after=WARM_UP_STEPS)
    staged = points.values("learner", "push_staged_s", after=WARM_UP_STEPS)
    saved = [t for t in points.values("learner", "seconds_checkpointing") if t > 0]
    verified = [header.verify_s for header in headers]
    stop_s = fmean(stopped) / 1e3 if stopped else 0.0
    return Rates(
        decode_s=1e-9,
        sequence_s=1e-9,
        train_fixed_s=fixed,
        train_token_s=per_token,
        hand_over_s=fmean(verified) if verified else 0.0,
        publish_s=fmean(points.values("learner", "seconds_publishing", after=WARM_UP_STEPS)),
        push_s=(fmean(staged) if staged else 0.0) + stop_s,
        stop_s=stop_s,
        checkpoint_s=fmean(saved) if saved else 0.0,
    )


def line_through(work: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(seconds at no work, seconds per unit of work), both at least 0, by least squares.

    Steps of one run differ little in size, so that their seconds at no work are far from what was seen: the line
    goes through the origin unless it misses it by `SURE` standard errors.
    """
    deviation = work - work.mean()
    spread = float(deviation @ deviation)
    slope = float(deviation @ (seconds - seconds.mean())) / spread if spread else 0.0
    fixed = float(seconds.mean() - slope * work.mean())
    left = seconds - fixed - slope * work
    variance = float(left @ left) / max(1, len(work) - 2)
    error = math.sqrt(variance * (1 / len(work) + float(work.mean()) ** 2 / spread)) if spread else math.inf
    if slope <= 0 or fixed <= SURE * error:
        return 0.0, float(seconds.sum() / work.sum())
    return fixed, slope


# --- the engine, by simulation ------------------------------------------------------------------------------


def _fit(recordings: Sequence[Recording]) -> tuple[Rates, tuple[str, ...]]:
    """The engine's rates, and the contention where there are several runs; the learner's are the fastest run's."""
    base = min((recording.rates for recording in recordings), key=lambda rates: rates.train_token_s)
    measured = recordings[0].measured
    per_token = measured.step_s / (
        recordings[0].recipe.responses_per_step * recordings[0].workload.lengths.mean
    )
    timed, several = any(r.measured.group_s is not None for r in recordings), len(recordings) > 1

    def rates_at(place: tuple[float, ...]) -> Rates:
        sequence_s = math.exp(place[0])
        decode_s = math.exp(place[1]) if timed else ASSUMED_HALF_RATE * sequence_s
        slowed = [1 + abs(more) for more in place[-2:]] if several else [1.0, 1.0]
        return replace(
            base,
            decode_s=decode_s,
            sequence_s=sequence_s,
            prompt_s=PROMPT_SHARE * sequence_s,
            train_contention=slowed[0],
            decode_contention=slowed[1],
        )

    start = [math.log(per_token)]
    start += [math.log(ASSUMED_HALF_RATE * per_token)] if timed else []
    start += [0.2, 0.2] if several else []
    best = compass_search(lambda place: misfit(rates_at(place), recordings), tuple(start))
    unseparated = f"decode floor not separable without recorded groups: taken to double at {ASSUMED_HALF_RATE} sequences"
    return rates_at(best), () if timed else (unseparated,)


def misfit(rates: Rates, recordings: Sequence[Recording]) -> float:
    """Sum of squared log errors: time of a step, of training and, where it was recorded, of a group in the engine."""
    error = 0.0
    for recording in recordings:
        measured, steps = recording.measured, min(recording.steps, FIT_STEPS)
        outcome = simulate(recording.recipe, rates, recording.workload, steps=steps)
        error += math.log(outcome.step_s / measured.step_s) ** 2
        if len(recordings) > 1:
            error += math.log(outcome.training_s / measured.training_s) ** 2
        if measured.group_s is not None:
            error += math.log(outcome.group_s / measured.group_s) ** 2
    return error


def compass_search(
    error: Callable[[tuple[float, ...]], float],
    start: tuple[float, ...],
    step: float = 1.0,
    finest: float = 0.03,
) -> tuple[float, ...]:
    """Minimise `error` from `start`: try each direction, halve the step where none is better (Kolda et al. 2003)."""
    best, least = start, error(start)
    while step > finest:
        moves = itertools.product(range(len(best)), (step, -step))
        tried = [tuple(v + d * (i == axis) for i, v in enumerate(best)) for axis, d in moves]
        found = min(((error(place), place) for place in tried), default=(math.inf, best))
        if found[0] < least:
            least, best = found
        else:
            step /= 2
    return best
