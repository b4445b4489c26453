"""What a step logs, with explicit denominators.

Invariant: every figure is a sum over all ranks divided by a count that its entry names; a figure whose
count is zero is left out, never reported as 0. Each name stands in `common.tracking.catalogue` (docs/metrics.md),
with its unit and its denominator.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from common.messages import Batch
from learner.batch import Responses
from learner.objectives import Objective
from learner.step import StepResult

VERDICTS = ("correct", "wrong", "unformatted", "truncated", "unverified")


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """`values` without what is not a finite number."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def batch_metrics(batch: Batch, responses: Responses, scheduled: int) -> dict[str, float]:
    """What the headers say: rewards, verdicts, lengths, staleness.

    Args:
        scheduled: responses scheduled for the step.
    """
    metrics: dict[str, float] = {"responses": float(scheduled)}
    if batch.scheduled:
        metrics["filtered_share"] = batch.filtered / batch.scheduled
    metrics |= _reward(batch, responses)
    if responses.count:
        verdicts = Counter(responses.verdicts)
        metrics |= {f"verdict_{name}": verdicts[name] / responses.count for name in VERDICTS}
        metrics |= _lengths(responses) | _staleness(responses)
    return metrics


def _reward(batch: Batch, responses: Responses) -> dict[str, float]:
    """A filtered group has one reward, shared by its G responses: the mean over groups is that over responses."""
    groups = [*responses.rewards.double().mean(1).tolist(), *batch.filtered_rewards]
    return {"reward": sum(groups) / len(groups)} if groups else {}


def _lengths(responses: Responses) -> dict[str, float]:
    lengths = responses.tokens.double()
    correct = torch.tensor([verdict == "correct" for verdict in responses.verdicts])
    metrics = {
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated_share": float(responses.truncated.double().mean()),
    }
    for name, chosen in (("length_correct", correct), ("length_incorrect", ~correct)):
        if chosen.any():
            metrics[name] = float(lengths[chosen].mean())
    return metrics


def _staleness(responses: Responses) -> dict[str, float]:
    lags: Counter[int] = Counter()
    for runs in responses.versions:
        for version, count in runs:
            lags[responses.step - version] += count
    tokens = sum(lags.values())
    metrics = {f"by_staleness/token_share_at_{lag}": count / tokens for lag, count in sorted(lags.items())}
    metrics["staleness_mean"] = sum(lag * count for lag, count in lags.items()) / tokens
    metrics["staleness_max"] = float(max(lags))
    return metrics


def update_metrics(result: StepResult, objective: Objective) -> dict[str, float]:
    """What the updates did; parts that the objective does not have are left out."""
    norms = [update.grad_norm for update in result.updates if math.isfinite(update.grad_norm)]
    absent: tuple[str, ...] = () if objective.needs_reference else ("kl_reference",)
    absent += () if objective.correction != "none" else ("correction", "dropped")
    tokens = {
        name: value
        for name, value in result.tokens.summary().items()
        if not name.removeprefix("by_staleness/").startswith(absent)
    }
    metrics = tokens | result.mismatch.summary()
    metrics["skipped_updates"] = float(sum(not update.applied for update in result.updates))
    if norms:
        metrics |= {"grad_norm": sum(norms) / len(norms), "grad_norm_max": max(norms)}
    if result.updates:
        metrics["lr"] = result.updates[-1].lr
    return metrics


class Clock:
    """Wall-clock seconds per activity since the last call of `metrics`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Time a block under the name of an activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - started

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds and shares since the last call, for a step that trained `tokens` tokens; then starts anew."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        names = ("waiting", "training", "publishing", "checkpointing")
        metrics = {f"seconds_{name}": seconds[name] for name in names}
        total = sum(metrics.values())
        if total:
            metrics["idle_share"] = seconds["waiting"] / total
        if seconds["training"]:
            metrics["tokens_per_s"] = tokens / seconds["training"]
        return metrics
