"""Weights for what the clip does not see: ρ = π_prox / μ, staleness and the difference between the engines.

With the anchor `proximal` the surrogate is ρ̂ × clipped(π / π_prox), where ρ̂ is one of the forms below (decoupled
PPO: arXiv 2110.00641; in asynchronous training: arXiv 2505.24298). ρ̂ never carries a gradient. It is known before
the optimizer step, and every form but `m2po` reads one whole response at most, so that it does not depend on the
micro-batch; what `m2po` needs from the whole step is one number, `second_moment_limit`.

Dropped tokens and responses keep their place in the denominators (N, L): dropping must not raise the others' weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.objectives.losses import bounded_exp
from learner.objectives.segments import segment_mean, segment_sum

CORRECTIONS = ("none", "tis", "icepop", "sequence_mask", "geometric_mask", "m2po")
DEFAULT_BOUNDS = {
    "none": (0.0, 0.0),
    "tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mask": (0.0, 2.0),
    "geometric_mask": (0.5, 2.0),
    "m2po": (0.0, 0.0),
}
TOKEN_CAP = 2.0  # of the token weight inside a response that `geometric_mask` keeps
SECOND_MOMENT = 0.04  # τ of M2PO


def tis(log_rho: Tensor, low: float, high: float) -> Tensor:
    """Truncated importance sampling, clamp(ρ, low, high) per token; default min(ρ, 2).

    Ionides 2008 (doi 10.1198/106186008X320456); V-trace's ρ̄ (arXiv 1802.01561, section 4.1); for the mismatch of
    training and inference engines: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training".
    """
    return bounded_exp(log_rho).clamp(low, high)


def icepop(log_rho: Tensor, low: float, high: float) -> Tensor:
    """ρ where low ≤ ρ ≤ high, else 0, per token; default [0.5, 5]. IcePop, arXiv 2510.18855."""
    rho = bounded_exp(log_rho)
    return rho * ((rho >= low) & (rho <= high))


def sequence_mask(log_rho: Tensor, low: float, high: float, sequence: Tensor, count: int) -> Tensor:
    """Sequence-level masked importance sampling: Π_t ρ_t for responses where it lies in [low, high], else 0.

    Liu, Li et al. 2025, "When Speed Kills Stability" (Seq-MIS, C = 2); masks of whole responses: arXiv 2512.23075.
    The product grows with length, so that long responses are dropped more often: see `geometric_mask`.
    """
    rho = bounded_exp(segment_sum(log_rho, sequence, count))
    return (rho * ((rho >= low) & (rho <= high)))[sequence]


def geometric_mask(log_rho: Tensor, low: float, high: float, sequence: Tensor, count: int) -> Tensor:
    """min(ρ_t, 2) in responses whose geometric mean of ρ_t lies in [low, high], else 0.

    Li, Liu 2025, "Trust Region Optimization via Sequence Masking" (Geo-Mask): the length-free form of
    `sequence_mask`. For engine mismatch alone bounds as tight as [0.999, 1.001] are in use; our default [0.5, 2]
    leaves room for staleness.
    """
    mean = bounded_exp(segment_mean(log_rho, sequence, count))
    return tis(log_rho, 0.0, TOKEN_CAP) * ((mean >= low) & (mean <= high))[sequence]


def m2po(log_rho: Tensor, limit: float) -> Tensor:
    """ρ where |log ρ| ≤ limit, else 0, per token; the limit comes from `second_moment_limit`. arXiv 2510.01161."""
    return bounded_exp(log_rho) * (log_rho.abs() <= limit)


def second_moment_limit(log_rho: Tensor, tau: float = SECOND_MOMENT) -> float:
    """Largest |log ρ| to keep so that the mean of (log ρ)² over the kept tokens is at most τ.

    M2PO (arXiv 2510.01161) drops the tokens with the largest second moment first and no more than needed.

    Args:
        log_rho: [T] of *all* trained tokens of the optimizer step, over all ranks.

    Returns:
        The limit; infinity when nothing needs to go, −1 when even the smallest exceeds τ (drops everything).
    """
    magnitudes = log_rho.detach().abs().sort().values
    count = len(magnitudes)
    moments = magnitudes.double().square()
    running = moments.cumsum(0) / torch.arange(1, count + 1, device=moments.device)
    kept = int((running <= tau).sum())  # the running mean of a sorted sequence never decreases
    if kept == count:
        return torch.inf
    # Equal magnitudes stand or fall together: keep what lies strictly below the first one to go.
    below = magnitudes[magnitudes < magnitudes[kept]]
    return float(below[-1]) if len(below) else -1.0
