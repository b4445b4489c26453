"""Advantages of whole groups: one number per response, from the rewards of the G responses to a question.

Invariant: a row is a *complete* group (design, I7), whatever happened to its members: truncated, wrong and
unformatted responses count with their reward. A group whose rewards are all equal (all correct, all wrong, all
truncated) has advantage exactly 0 under every baseline; an empty batch gives an empty result.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from common.errors import UserError
from learner.objectives.choices import check_choice, name_rows

GROUP_ADVANTAGES = ("dr_grpo", "grpo", "rloo", "none")
STD_EPSILON = 1e-8  # added to the standard deviation, as in oat


def group_advantages(kind: str, rewards: Tensor, names: Collection[str] | None = None) -> Tensor:
    """Advantages of each response within its group.

    dr_grpo  R − mean(R)                          Dr. GRPO, arXiv 2503.20783, section 3.1
    grpo     (R − mean(R)) / (std(R) + 1e-8)      GRPO, arXiv 2402.03300; std is unbiased (G − 1)
    rloo     R_i − mean of the other G − 1        arXiv 2402.14740; equals G/(G − 1) × dr_grpo
    none     R                                    REINFORCE without a baseline

    Args:
        kind: one of GROUP_ADVANTAGES.
        rewards: [groups, G], any real dtype.
        names: group ids for error messages, in row order.

    Returns:
        [groups, G], float32 (float64 for float64 rewards).

    Raises:
        UserError: unknown kind; G = 1 with a baseline, since the baseline would be the reward itself; a reward
            that is not finite (the message names the group).
    """
    check_choice("algorithm.advantage", kind, GROUP_ADVANTAGES)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [groups, G], not {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    check_finite("reward", rewards, names)
    size = rewards.shape[1]
    if kind == "none" or rewards.numel() == 0:
        return rewards.clone()
    if size == 1:
        raise UserError(
            f"{kind} compares the responses to one question and needs at least 2, not 1",
            setting="rollout.group_size",
        )
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(zero_variance(rewards)[:, None], 0.0)
    if kind == "grpo":
        return centred / (rewards.std(1, keepdim=True) + STD_EPSILON)
    if kind == "rloo":
        return centred * (size / (size - 1))
    return centred


def zero_variance(rewards: Tensor) -> Tensor:
    """[groups] bool: all rewards of the group are equal, so that it has no gradient under any group baseline."""
    return (rewards == rewards[:, :1]).all(1)


def check_finite(what: str, values: Tensor, names: Collection[str] | None = None) -> None:
    """Raise UserError naming the rows of `values` [rows, ...] that hold NaN or infinity."""
    bad = (
        ~torch.isfinite(values).flatten(1).all(1) if values.numel() else values.new_zeros(0, dtype=torch.bool)
    )
    if bad.any():
        where = name_rows(bad.nonzero().squeeze(1).tolist(), names)
        raise UserError(f"{what} is not a finite number in {where}")
