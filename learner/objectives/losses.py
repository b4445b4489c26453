"""Policy losses of single tokens, to be *minimised*; no reduction happens here.

Every ratio is π / anchor, handed in as its logarithm. Clip offsets are the papers' ε: the trust region is
[1 − low, 1 + high] for every loss, so that CISPO's [0, 5] is low = 1, high = 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learner.objectives.segments import segment_mean

LOSSES = ("ppo_clip", "cispo", "gspo", "reinforce")
DEFAULT_CLIP = {"ppo_clip": (0.2, 0.2), "cispo": (1.0, 4.0), "gspo": (3e-4, 4e-4), "reinforce": (0.0, 0.0)}
MAX_LOG_RATIO = 20.0  # e²⁰ ≈ 5e8: beyond it the ratio is held constant, so that nothing overflows to infinity


class TokenLoss(NamedTuple):
    """Per token: the loss [T], and where the lower / upper edge of the trust region removed the gradient
    or capped the weight ([T] bool)."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, with the argument held in ±MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_clip(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> TokenLoss:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A), PPO (arXiv 1707.06347, eq. 7).

    low ≠ high is DAPO's clip-higher (arXiv 2503.14476). With `dual_clip` c > 1 the loss of a token with A < 0 is
    at most −c A, which bounds what PPO leaves unbounded as ρ grows (arXiv 1912.09729; they use c = 3).

    Args:
        log_ratio, advantages: [T].
    """
    ratio = bounded_exp(log_ratio)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    clipped_high = (advantages > 0) & (ratio > 1 + high)
    if dual_clip is not None:
        floor = dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
        clipped_high = clipped_high | ((advantages < 0) & (ratio > dual_clip))
    return TokenLoss(-objective, (advantages < 0) & (ratio < 1 - low), clipped_high)


def cispo(log_ratio: Tensor, advantages: Tensor, low: float, high: float, logp: Tensor) -> TokenLoss:
    """−sg(clip(ρ, 1 − low, 1 + high)) A log π: the weight is clipped, no token loses its gradient.

    CISPO, arXiv 2506.13585, eq. 4, which sets no lower bound either. Bounds around 1 as in PPO would make it another
    method: the default is [0, 5].
    """
    ratio = bounded_exp(log_ratio.detach())
    weight = ratio.clamp(1 - low, 1 + high)
    return TokenLoss(-weight * advantages * logp, ratio < 1 - low, ratio > 1 + high)


def gspo(
    log_ratio: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    sequence: Tensor,
    count: int,
) -> TokenLoss:
    """PPO's clip on the sequence ratio s = exp(mean_t log ρ_t), the same for all tokens of a response.

    GSPO, arXiv 2507.18071, eq. 5 and 7, with the 3e-4 / 4e-4 of its section 5.1. With `response_mean`
    aggregation the sum over tokens is exactly its objective. Needs whole sequences, which packing guarantees.

    Args:
        sequence: [T] int64 in 0..count−1.
    """
    log_s = segment_mean(log_ratio, sequence, count)
    return ppo_clip(log_s[sequence], advantages, low, high)


def reinforce(advantages: Tensor, logp: Tensor) -> TokenLoss:
    """−A log π (Williams 1992): no ratio, no trust region."""
    never = torch.zeros_like(advantages, dtype=torch.bool)
    return TokenLoss(-advantages * logp, never, never)
