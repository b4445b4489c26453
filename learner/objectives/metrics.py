"""What a step reports about its ratios, as sums with explicit denominators, by staleness of the token.

Invariant: a TokenMetrics is nothing but sums and maxima, so that adding micro-batches and reducing over ranks
gives exactly the metrics of the whole step. Means are formed once, in `summary`, after the last reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.tracking.catalogue import BUCKETS
from learner.objectives.losses import TokenLoss, bounded_exp

# First staleness (in policy versions) of each bucket; the tracker names them `BUCKETS`.
BUCKET_STARTS = (0, 1, 2, 3, 5, 9)
SUMS = (
    "tokens",
    "ratio",
    "ratio_squared",
    "clip_low",
    "clip_high",
    "kl_behaviour",
    "entropy",
    "correction",
    "dropped",
    "kl_reference",
    "loss",
)


@dataclass(frozen=True, slots=True)
class TokenMetrics:
    """Additive metrics of a set of response tokens.

    Attributes:
        sums: [buckets, len(SUMS)] float64; reduce over ranks with SUM.
        maxima: [buckets] float64, the largest ratio π/μ (0 where there is no token); reduce with MAX.
    """

    sums: Tensor
    maxima: Tensor

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> TokenMetrics:
        """The neutral element of addition."""
        buckets = len(BUCKET_STARTS)
        return cls(
            torch.zeros((buckets, len(SUMS)), dtype=torch.float64, device=device),
            torch.zeros(buckets, dtype=torch.float64, device=device),
        )

    def __add__(self, other: TokenMetrics) -> TokenMetrics:
        return TokenMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def summary(self) -> dict[str, float]:
        """Means over all tokens under plain names, and per staleness bucket under `by_staleness/name_at_<bucket>`.

        `ratio_ess` is (Σρ)² / (T Σρ²), the share of the tokens that counts after weighting. A bucket without
        tokens reports nothing.
        """
        result = _means(self.sums.sum(0).tolist(), float(self.maxima.max()))
        for name, row, largest in zip(BUCKETS, self.sums.tolist(), self.maxima.tolist(), strict=True):
            result |= {f"by_staleness/{key}_at_{name}": value for key, value in _means(row, largest).items()}
        return result


def _means(row: list[float], largest: float) -> dict[str, float]:
    sums = dict(zip(SUMS, row, strict=True))
    tokens = sums.pop("tokens")
    if not tokens:
        return {}
    squared = sums.pop("ratio_squared")
    means = {"tokens": tokens, "loss": sums.pop("loss")}
    means |= {f"{name}_mean": value / tokens for name, value in sums.items()}
    return means | {
        "ratio_max": largest,
        "ratio_ess": sums["ratio"] ** 2 / (tokens * squared) if squared else 0.0,
    }


@torch.no_grad()
def token_metrics(
    log_ratio: Tensor,
    policy: TokenLoss,
    *,
    loss: Tensor,
    correction: Tensor | None = None,
    kl_reference: Tensor | None = None,
    entropy: Tensor | None = None,
    staleness: Tensor | None = None,
) -> TokenMetrics:
    """Metrics of one micro-batch.

    Args:
        log_ratio: [T] log π/μ, whatever the loss is anchored at: it measures how off-policy the token is. Its k3,
            ρ − 1 − log ρ, estimates KL(μ ‖ π).
        policy: supplies where the clip acted.
        loss: [T] weighted loss; summed, not averaged.
        staleness: [T] int64 policy versions between sampling and training; None counts as 0.
    """
    ratio = bounded_exp(log_ratio)
    zeros = torch.zeros_like(ratio)
    columns = {
        "tokens": torch.ones_like(ratio),
        "ratio": ratio,
        "ratio_squared": ratio.double().square(),
        "clip_low": policy.clipped_low,
        "clip_high": policy.clipped_high,
        "kl_behaviour": ratio - 1 - log_ratio,
        "entropy": zeros if entropy is None else entropy,
        "correction": torch.ones_like(ratio) if correction is None else correction,
        "dropped": zeros if correction is None else correction == 0,
        "kl_reference": zeros if kl_reference is None else kl_reference,
        "loss": loss,
    }
    table = torch.stack([columns[name].double() for name in SUMS], 1)
    bucket = _buckets(staleness, ratio)
    zero = TokenMetrics.zero(ratio.device)
    return TokenMetrics(
        zero.sums.index_add(0, bucket, table),
        zero.maxima.scatter_reduce(0, bucket, ratio.double(), "amax"),
    )


def _buckets(staleness: Tensor | None, like: Tensor) -> Tensor:
    if staleness is None:
        return torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    starts = torch.tensor(BUCKET_STARTS[1:], device=staleness.device)
    return torch.bucketize(staleness, starts, right=True)
