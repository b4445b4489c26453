"""Metrics: explicit denominators, buckets by staleness, sums that add over micro-batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from common.tracking.catalogue import entry_of, full_name
from learner.objectives.losses import ppo_clip
from learner.objectives.metrics import BUCKET_STARTS, BUCKETS, TokenMetrics, token_metrics

LOG_RATIO = torch.tensor([0.0, math.log(1.5), math.log(0.5), 0.1])
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, 1.0])


def measure(part=slice(None), **fields):
    policy = ppo_clip(LOG_RATIO[part], ADVANTAGES[part], 0.2, 0.2)
    return token_metrics(LOG_RATIO[part], policy, loss=policy.loss, **{k: v[part] for k, v in fields.items()})


def test_means_over_all_tokens():
    summary = measure(entropy=torch.tensor([1.0, 2.0, 3.0, 4.0])).summary()
    ratio = LOG_RATIO.exp()
    assert summary["tokens"] == 4
    assert summary["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert summary["ratio_max"] == pytest.approx(1.5)
    assert summary["ratio_ess"] == pytest.approx(float(ratio.sum() ** 2 / (4 * ratio.square().sum())))
    assert summary["clip_high_mean"] == 0.25
    assert summary["clip_low_mean"] == 0.25
    assert summary["kl_behaviour_mean"] == pytest.approx(float((ratio - 1 - LOG_RATIO).mean()))
    assert summary["entropy_mean"] == 2.5


def test_adding_parts_gives_the_whole_and_zero_is_neutral():
    staleness = torch.tensor([0, 1, 4, 20])
    whole = measure(staleness=staleness)
    parts = sum((measure(slice(i, i + 1), staleness=staleness) for i in range(4)), TokenMetrics.zero())
    assert parts.summary() == pytest.approx(whole.summary())


def test_buckets_by_staleness():
    summary = measure(staleness=torch.tensor([0, 4, 4, 20])).summary()
    assert summary["by_staleness/tokens_at_0"] == 1
    assert summary["by_staleness/tokens_at_3-4"] == 2
    assert summary["by_staleness/ratio_max_at_3-4"] == pytest.approx(1.5)
    assert summary["by_staleness/tokens_at_9-up"] == 1
    assert "by_staleness/tokens_at_1" not in summary


def test_every_staleness_falls_into_the_bucket_that_its_name_says():
    for staleness in range(30):
        metrics = measure(staleness=torch.full((4,), staleness))
        (name,) = (
            key.split("_")[-1] for key in metrics.summary() if key.startswith("by_staleness/tokens_at_")
        )
        low, _, high = name.partition("-")
        assert int(low) <= staleness
        assert high == "up" or staleness <= int(high or low)
    assert len(BUCKETS) == len(BUCKET_STARTS)


def test_every_name_is_in_the_catalogue():
    summary = measure(staleness=torch.tensor([0, 2, 4, 20])).summary()
    assert all(entry_of(full_name("learner", name)) for name in summary)


def test_correction_and_its_drops():
    summary = measure(correction=torch.tensor([1.0, 0.0, 2.0, 0.0])).summary()
    assert summary["correction_mean"] == 0.75
    assert summary["dropped_mean"] == 0.5
