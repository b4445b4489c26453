"""How token losses become one number: a weight per token that is known before the optimizer step.

Invariant (design, I5): the loss of an optimizer step is Σ over its tokens of weight × token loss, and the weight
depends only on the step's plan: never on the micro-batch, the packing, the padding or the rank. Sums over
micro-batches and ranks therefore add up to the loss of the whole step exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.choices import check_choice

AGGREGATIONS = ("constant", "response_mean", "token_mean")


@dataclass(frozen=True, slots=True)
class StepSize:
    """What one optimizer step was planned to hold, over all ranks.

    Attributes:
        responses: N, the responses *scheduled* for the step. Groups without variance that were filtered out
            still count, otherwise dropping them would raise the learning rate.
        tokens: response tokens really in the step; read by `token_mean` only.
    """

    responses: int
    tokens: int

    def __post_init__(self) -> None:
        if self.responses < 1 or self.tokens < 0:
            raise ValueError(
                f"a step needs responses ≥ 1 and tokens ≥ 0, not {self.responses}, {self.tokens}"
            )


def sequence_weights(kind: str, lengths: Tensor, size: StepSize, normaliser: float) -> Tensor:
    """Weight of every token of each response; all three forms give one number per response.

    constant       1 / (N · L)      unbiased: L is a recipe constant (arXiv 2503.20783, Listing 1, green)
    response_mean  1 / (N · |o_i|)  GRPO's: tokens of long responses count less (Listing 1, red, axis −1)
    token_mean     1 / Σ|o_i|       one mean over the step's tokens (Listing 1, red, no axis)

    Args:
        lengths: [n] response tokens of each response (those trained on), n any part of the step.
        size: of the whole optimizer step.
        normaliser: L, in tokens; the paper takes the generation budget.

    Returns:
        [n] float32.
    """
    check_choice("algorithm.aggregation", kind, AGGREGATIONS)
    lengths = lengths.to(torch.float32)
    if kind == "constant":
        return torch.full_like(lengths, 1.0 / (size.responses * normaliser))
    if kind == "response_mean":
        return 1.0 / (size.responses * lengths.clamp(min=1))
    return torch.full_like(lengths, 1.0 / max(size.tokens, 1))
