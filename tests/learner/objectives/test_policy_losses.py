"""Token losses: where the clip acts, what it bounds, and what stays constant within a response."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.losses import MAX_LOG_RATIO, cispo, gspo, ppo_clip, reinforce

LOG_RATIOS = st.floats(-6, 6)
ADVANTAGES = st.floats(-3, 3)


def gradient(function, log_ratio: float, advantage: float) -> float:
    """∂loss/∂log π of one token."""
    leaf = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    function(leaf, torch.tensor([advantage], dtype=torch.float64)).loss.sum().backward()
    return float(leaf.grad)


@given(LOG_RATIOS, ADVANTAGES)
def test_ppo_gradient_stops_exactly_where_the_ratio_has_gone_too_far_the_good_way(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    stops = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    got = gradient(lambda lr, a: ppo_clip(lr, a, 0.2, 0.28), log_ratio, advantage)
    assert got == pytest.approx(0.0 if stops else -ratio * advantage, rel=1e-9)
    inputs = (torch.tensor([number], dtype=torch.float64) for number in (log_ratio, advantage))
    result = ppo_clip(*inputs, 0.2, 0.28)
    assert bool(result.clipped_high | result.clipped_low) == (stops and advantage != 0)


@given(LOG_RATIOS, ADVANTAGES)
def test_ppo_never_promises_more_than_the_unclipped_surrogate(log_ratio, advantage):
    loss = float(ppo_clip(torch.tensor([log_ratio]), torch.tensor([advantage]), 0.2, 0.2).loss)
    assert loss >= -math.exp(log_ratio) * advantage - 1e-4 * abs(loss) - 1e-6


@given(st.floats(-30, 30), ADVANTAGES)
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(log_ratio, advantage):
    inputs = torch.tensor([log_ratio]), torch.tensor([advantage])
    plain, dual = ppo_clip(*inputs, 0.2, 0.2), ppo_clip(*inputs, 0.2, 0.2, 3.0)
    if advantage >= 0 or math.exp(log_ratio) < 2.999:
        assert torch.equal(plain.loss, dual.loss)
    else:
        assert float(dual.loss) <= -3.0 * advantage * (1 + 1e-6)
        assert gradient(lambda lr, a: ppo_clip(lr, a, 0.2, 0.2, 3.0), 2.0, -1.0) == 0


@given(LOG_RATIOS, ADVANTAGES)
def test_cispo_keeps_every_token_and_bounds_its_weight(log_ratio, advantage):
    def function(log_pi, a):
        return cispo(log_pi, a, 1.0, 4.0, log_pi)

    weight = min(math.exp(log_ratio), 5.0)
    assert gradient(function, log_ratio, advantage) == pytest.approx(-weight * advantage, rel=1e-9)


def test_cispo_reports_the_capped_tokens():
    log_ratio = torch.tensor([0.0, 1.7, -9.0])
    result = cispo(log_ratio, torch.ones(3), 1.0, 4.0, log_ratio)
    assert result.clipped_high.tolist() == [False, True, False]
    assert not result.clipped_low.any()


def gspo_batch():
    sequence = torch.tensor([0, 0, 0, 1, 1, 2])
    log_ratio = torch.tensor([0.3, -0.1, 0.1, 0.0, 0.0, -0.2], dtype=torch.float64, requires_grad=True)
    return log_ratio, torch.tensor([1.0, 1, 1, -1, -1, 1], dtype=torch.float64), sequence


def test_gspo_is_constant_within_a_response_and_is_ppo_on_the_geometric_mean():
    log_ratio, advantages, sequence = gspo_batch()
    loss = gspo(log_ratio, advantages, 0.2, 0.2, sequence, 3).loss
    means = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, -0.2], dtype=torch.float64)
    torch.testing.assert_close(loss, ppo_clip(means, advantages, 0.2, 0.2).loss)


def test_gspo_with_response_mean_has_the_papers_gradient():
    log_ratio, advantages, sequence = gspo_batch()
    lengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    loss = gspo(log_ratio, advantages, 0.9, 0.9, sequence, 3).loss
    (loss / (3 * lengths[sequence])).sum().backward()
    s = torch.tensor([math.exp(0.1), 1.0, math.exp(-0.2)], dtype=torch.float64)
    torch.testing.assert_close(log_ratio.grad, -(s * torch.tensor([1.0, -1, 1]) / (3 * lengths))[sequence])


def test_reinforce_ignores_the_ratio():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    reinforce(torch.tensor([2.0, -1.0]), logp).loss.sum().backward()
    assert logp.grad.tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_absurd_ratios_stay_finite(log_ratio, advantage):
    leaf = torch.tensor([log_ratio], requires_grad=True)
    loss = ppo_clip(leaf, torch.tensor([advantage]), 0.2, 0.2).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert float(leaf.grad) == 0.0
    assert loss.abs().item() <= math.exp(MAX_LOG_RATIO) * 1.001
