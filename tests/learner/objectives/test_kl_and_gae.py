"""KL estimators against the exact divergence, GAE against its recursion, the value loss against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from learner.objectives.gae import gae, token_rewards, value_loss
from learner.objectives.kl import KL_ESTIMATORS, kl_estimate, token_penalties

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)


def test_k3_averages_to_the_divergence():
    exact = (P * (P / Q).log()).sum()
    torch.testing.assert_close((P * kl_estimate("k3", P.log(), Q.log())).sum(), exact)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_as_a_loss_it_pulls_towards_the_reference(kind):
    """Mean gradient over samples of p, by enumeration; that of k1 would be 0 everywhere."""
    logits = P.log().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    (P * kl_estimate(kind, logp, Q.log())).sum().backward()
    exact = P * ((P / Q).log() - (P * (P / Q).log()).sum())
    assert float(torch.nn.functional.cosine_similarity(logits.grad, exact, dim=0)) > 0.9


def test_k2_is_close_for_close_distributions_only():
    exact = float((P * (P / Q).log()).sum())
    near = P + 0.01 * (Q - P)
    assert float((P * kl_estimate("k2", P.log(), Q.log())).sum()) != pytest.approx(exact, rel=1e-2)
    exact = float((P * (P / near).log()).sum())
    assert float((P * kl_estimate("k2", P.log(), near.log())).sum()) == pytest.approx(exact, rel=1e-2)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_k3_is_never_negative_and_always_finite(logp, logq):
    estimate = kl_estimate("k3", torch.tensor(logp), torch.tensor(logq))
    assert 0 <= float(estimate) < float("inf")


def test_unknown_estimator_lists_the_valid_ones():
    with pytest.raises(UserError, match="k2, k3"):
        kl_estimate("k4", P, Q)


def test_penalty_in_the_reward_is_unbiased():
    """k1, which averages to the divergence."""
    exact = (P * (P / Q).log()).sum()
    torch.testing.assert_close((P * token_penalties(0.1, P.log(), Q.log())).sum(), -0.1 * exact)


def reference_gae(rewards, values, lengths, gamma, lam):
    advantages, start = [], 0
    for length in lengths:
        following, running, part = 0.0, 0.0, []
        for t in reversed(range(start, start + length)):
            running = rewards[t] + gamma * following - values[t] + gamma * lam * running
            following = values[t]
            part.append(running)
        advantages += reversed(part)
        start += length
    return advantages


@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=5),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_gae_equals_its_recursion(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(sum(lengths), dtype=torch.float64, generator=generator) for _ in range(2))
    advantages, returns = gae(rewards, values, torch.tensor(lengths, dtype=torch.int64), gamma, lam)
    expected = torch.tensor(
        reference_gae(rewards.tolist(), values.tolist(), lengths, gamma, lam), dtype=torch.float64
    )
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_undiscounted_gae_is_outcome_minus_value():
    lengths = torch.tensor([3, 2])
    rewards = token_rewards(torch.tensor([1.0, 0.0]), lengths)
    assert rewards.tolist() == [0, 0, 1, 0, 0]
    values = torch.tensor([0.2, 0.5, 0.9, 0.4, 0.1])
    advantages, returns = gae(rewards, values, lengths, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([1.0, 1, 1, 0, 0]))
    torch.testing.assert_close(advantages, returns - values)


def test_token_rewards_add_to_penalties():
    rewards = token_rewards(torch.tensor([1.0]), torch.tensor([2]), torch.tensor([-0.1, -0.2]))
    torch.testing.assert_close(rewards, torch.tensor([-0.1, 0.8]))


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(value_loss(values, old, returns, 0.2), torch.tensor([0.32, 0.405]))
    torch.testing.assert_close(value_loss(values, old, returns, None), torch.tensor([0.0, 0.405]))
