"""Advantages of groups: the formulas, and what happens at every edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from learner.objectives.advantages import GROUP_ADVANTAGES, group_advantages, zero_variance

BASELINES = [kind for kind in GROUP_ADVANTAGES if kind != "none"]
GROUPS = st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("grpo", [1.5, -0.5, -0.5, -0.5]),  # unbiased std of (1, 0, 0, 0) is 1/2
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("none", [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_one_correct_response_of_four(kind, expected):
    advantages = group_advantages(kind, torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(advantages, torch.tensor([expected]), rtol=1e-6, atol=1e-6)


@given(GROUPS)
def test_rloo_is_the_leave_one_out_mean_and_a_multiple_of_dr_grpo(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    rloo = group_advantages("rloo", rewards)
    others = torch.stack([(rewards.sum(1) - rewards[:, i]) / 3 for i in range(4)], 1)
    torch.testing.assert_close(rloo, rewards - others, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rloo, 4 / 3 * group_advantages("dr_grpo", rewards), rtol=1e-9, atol=1e-9)


@given(GROUPS, st.sampled_from(BASELINES), st.floats(-3, 3))
def test_baselines_sum_to_zero_and_ignore_a_shift_of_the_rewards(rewards, kind, shift):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(kind, rewards)
    assert advantages.sum(1).abs().max() < 1e-6
    if kind != "grpo":  # its ε makes the shift's rounding visible in nearly equal groups
        torch.testing.assert_close(group_advantages(kind, rewards + shift), advantages, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize(
    "reward", [0.0, 1.0, 0.1]
)  # all truncated or wrong, all correct, not a binary fraction
def test_group_without_variance_has_exactly_zero_advantage(kind, reward):
    rewards = torch.tensor([[reward] * 7, [0.0] * 6 + [1.0]])
    assert zero_variance(rewards).tolist() == [True, False]
    advantages = group_advantages(kind, rewards)
    assert not advantages[0].any()
    assert advantages[1].all()


@pytest.mark.parametrize("kind", GROUP_ADVANTAGES)
@pytest.mark.parametrize("shape", [(0, 8), (0, 0), (0, 1)])
def test_empty_batch_is_empty(kind, shape):
    assert group_advantages(kind, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("kind", BASELINES)
def test_group_of_one_is_refused_with_a_baseline(kind):
    with pytest.raises(UserError, match=r"rollout\.group_size: .* at least 2, not 1"):
        group_advantages(kind, torch.tensor([[1.0]]))


def test_group_of_one_is_fine_without_baseline():
    assert group_advantages("none", torch.tensor([[1.0]])).tolist() == [[1.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", GROUP_ADVANTAGES)
def test_reward_that_is_not_finite_names_its_group(kind, bad):
    with pytest.raises(UserError, match="group q17"):
        group_advantages(kind, torch.tensor([[0.0, 1.0], [bad, 0.0]]), ["q3", "q17"])


def test_long_lists_of_bad_groups_are_cut():
    with pytest.raises(UserError, match="group 0, group 1, group 2 and 7 more"):
        group_advantages("dr_grpo", torch.full((10, 2), float("nan")))


def test_unknown_advantage_lists_the_valid_ones():
    with pytest.raises(UserError, match="dr_grpo, grpo, rloo, none"):
        group_advantages("drgrpo", torch.zeros(1, 2))


def test_integer_rewards_are_welcome():
    assert group_advantages("dr_grpo", torch.tensor([[1, 0]])).tolist() == [[0.5, -0.5]]
