"""What a step logs, with explicit denominators.

Invariant: every figure is a sum over all ranks divided by a count that its line below names; a figure whose
count is zero is left out, never reported as 0. All names begin with `train/`.

| name | what, and over what |
|---|---|
| reward | mean reward of all responses of the step, filtered groups included |
| responses, filtered_share | responses scheduled (N of the step); share of its groups filtered for equal rewards |
| verdict_correct ... verdict_unverified | shares of the responses sent to the learner |
| length, length_correct, length_incorrect | mean response tokens of the responses sent: all, correct, all others |
| length_max, truncated_share | longest response; share of the responses sent that hit the budget |
| tokens | response tokens that went through the loss, epochs counted (the denominator of the next block) |
| loss | sum of the weighted token losses |
| ratio_mean, ratio_max, ratio_ess | π/μ per token; (Σρ)² / (T Σρ²) |
| clip_low_mean, clip_high_mean | shares of tokens whose gradient the lower / upper clip removed |
| kl_behaviour_mean | k3 estimate of KL(μ ‖ π), nats per token |
| entropy_mean | of the policy, nats per token |
| correction_mean, dropped_mean | weight of the staleness correction; share of tokens it dropped |
| kl_reference_mean | KL to the reference model, nats per token (with a reference model) |
| .../staleness_0 ... | each of this block for tokens of one staleness |
| staleness_mean, staleness_max, staleness_share/n | versions behind, over response tokens; share of tokens n behind |
| mismatch_mean, mismatch_max, mismatch_k3 | log π(learner) − log μ(engine) at equal weights, over mismatch_tokens |
| mismatch_measured_share | share of the steps so far that had tokens to compare |
| grad_norm, grad_norm_max, skipped_updates | mean and largest norm before clipping; updates that were not finite |
| lr | learning rate of the last update |
| invalid_responses | responses refused by the learner (ids outside the vocabulary, log-probs not finite) |
| seconds_waiting, seconds_training, seconds_publishing, seconds_checkpointing | wall-clock of this step |
| idle_share | seconds_waiting / all seconds of the step |
| tokens_per_s | prompt and response tokens trained per second of training, all ranks |
| checkpoint_failures, push_... | checkpoints that a full disk prevented; meters of the weight push |
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from common.messages import Batch
from learner.batch import Responses
from learner.objectives import Objective
from learner.step import StepResult

VERDICTS = ("correct", "wrong", "unformatted", "truncated", "unverified")


def prefixed(values: Mapping[str, float]) -> dict[str, float]:
    """`values` under their names in the log, without what is not a finite number."""
    return {f"train/{name}": float(value) for name, value in values.items() if math.isfinite(value)}


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
    metrics = {f"staleness_share/{lag}": count / tokens for lag, count in sorted(lags.items())}
    metrics["staleness_mean"] = sum(lag * count for lag, count in lags.items()) / tokens
    metrics["staleness_max"] = float(max(lags))
    return metrics


def update_metrics(result: StepResult, objective: Objective) -> dict[str, float]:
    """What the updates did; parts that the objective does not have are left out."""
    norms = [update.grad_norm for update in result.updates if math.isfinite(update.grad_norm)]
    absent = () if objective.needs_reference else ("kl_reference",)
    absent += () if objective.correction != "none" else ("correction", "dropped")
    tokens = {name: value for name, value in result.tokens.summary().items() if not name.startswith(absent)}
    metrics = tokens | result.mismatch.summary()
    metrics["skipped_updates"] = float(sum(not update.applied for update in result.updates))
    if norms:
        metrics |= {"grad_norm": sum(norms) / len(norms), "grad_norm_max": max(norms)}
    if result.updates:
        metrics["lr"] = result.updates[-1].lr
    return metrics


class Clock:
    """Wall-clock seconds per activity since the last `reset`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

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
        seconds, self.seconds = self.seconds, Counter()
        names = ("waiting", "training", "publishing", "checkpointing")
        metrics = {f"seconds_{name}": seconds[name] for name in names}
        total = sum(metrics.values())
        if total:
            metrics["idle_share"] = seconds["waiting"] / total
        if seconds["training"]:
            metrics["tokens_per_s"] = tokens / seconds["training"]
        return metrics
