"""Estimators of the Kullback-Leibler divergence from samples, and their two uses: loss term and reward penalty.

Notation: x = log q − log p on tokens sampled from p. k1 = −x is unbiased and can be negative; k2 = x²/2 is
biased with low variance; k3 = eˣ − 1 − x is unbiased and never negative (Schulman, "Approximating KL divergence",
2020). All estimate KL(p ‖ q). As a loss term, p is the current policy and q the reference (GRPO, arXiv
2402.03300, eq. 4, uses k3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.objectives.choices import check_choice
from learner.objectives.losses import MAX_LOG_RATIO

KL_ESTIMATORS = ("k2", "k3")  # as a loss; k1 has the right value, and a gradient of 0 in the mean


def kl_estimate(kind: str, logp: Tensor, logq: Tensor) -> Tensor:
    """Estimate of KL(p ‖ q) per token, in nats, for a loss.

    Args:
        logp, logq: [T], log-probabilities of tokens sampled from p.
    """
    check_choice("algorithm.kl_estimator", kind, KL_ESTIMATORS)
    x = logq - logp
    if kind == "k2":
        return 0.5 * x.square()
    x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(x) - x


def token_penalties(coefficient: float, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """−coefficient × k1 per token [T]: what each step's reward loses (PPO with a KL penalty in the reward)."""
    return -coefficient * (logp - ref_logp).detach()
