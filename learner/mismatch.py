"""The mismatch meter (design, I6): does the learner agree with what the engine recorded, at the same weights?

Only tokens sampled by the very version that is about to train can be compared: at the first forward pass of a
step the learner's weights are those that sampled them, so that any difference is numerical (or a defect).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.losses import MAX_LOG_RATIO


@dataclass(slots=True)
class Mismatch:
    """Sums over the compared tokens; d = log π(learner) − log μ(engine), in nats.

    Attributes:
        sums: [3] float64: tokens, Σ|d|, Σ(eᵈ − 1 − d), the k3 estimate of KL(μ ‖ π).
        largest: [1] float64, max |d|.
    """

    sums: Tensor
    largest: Tensor

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Mismatch:
        """Nothing compared yet."""
        return cls(
            torch.zeros(3, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def add(self, logp: Tensor, behaviour_logp: Tensor, current: Tensor) -> None:
        """Compare the tokens of one row where `current` [T] is true."""
        difference = torch.where(current, logp - behaviour_logp, 0.0).double()
        held = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        absolute = difference.abs()
        self.sums += torch.stack([current.sum(), absolute.sum(), (torch.expm1(held) - held).sum()])
        if len(absolute):
            self.largest = torch.maximum(self.largest, absolute.max())

    def summary(self) -> dict[str, float]:
        """Means over the compared tokens; empty when there was none."""
        tokens, absolute, k3 = self.sums.tolist()
        if not tokens:
            return {}
        return {
            "mismatch_tokens": tokens,
            "mismatch_mean": absolute / tokens,
            "mismatch_max": float(self.largest),
            "mismatch_k3": k3 / tokens,
        }
