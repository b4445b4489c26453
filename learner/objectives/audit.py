"""Does a token's gradient depend on how long responses are? A numeric audit of loss aggregations.

The paper's Listing 1 and Table 2 (arXiv 2503.20783) read the answer off the code of five frameworks. Here each
aggregation is *run*: the derivative of the loss by one token's loss is probed while (a) its own response, (b)
another response of the same batch grows, and (c) the same batch is split into two micro-batches. An unbiased
aggregation moves under none of them. `slipstream study length-bias` prints the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.aggregation import AGGREGATIONS, StepSize, sequence_weights

# A batch is micro-batches of responses of token losses.
Batch = Sequence[Sequence[Tensor]]
Aggregate = Callable[[Batch], Tensor]

BUDGET = 4096
LENGTHS = (64, 256, 1024)
OTHER_LENGTH = 256
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Verdict on one aggregation.

    Attributes:
        name: what does the aggregation, with the place in its code where there is one.
        formula: in the notation of docs/algorithms.md.
        gradients: |∂loss/∂token| for own lengths LENGTHS, the rest of the batch fixed.
        own_length: exponent k in gradient ∝ length^k, from the first to the last of LENGTHS; 0 is unbiased, −1 is
            a mean over the response.
        other_length: the same while another response of the batch grows.
        splitting: gradient when the batch is two micro-batches, relative to one micro-batch; 1 is invariant.
    """

    name: str
    formula: str
    gradients: tuple[float, ...]
    own_length: float
    other_length: float
    splitting: float

    @property
    def biases(self) -> tuple[str, ...]:
        """What the gradient of a token depends on though it should not; empty if unbiased."""
        moves = {
            "own length": abs(self.own_length) > TOLERANCE,
            "other lengths": abs(self.other_length) > TOLERANCE,
            "micro-batches": abs(self.splitting - 1) > TOLERANCE,
        }
        return tuple(name for name, found in moves.items() if found)

    @property
    def unbiased(self) -> bool:
        """Nothing but the token's own loss decides its gradient."""
        return not self.biases


def mean_per_response(batch: Batch) -> Tensor:
    """`masked_mean(loss, mask, -1).mean()`, averaged over micro-batches."""
    return torch.stack([torch.stack([row.mean() for row in micro]).mean() for micro in batch]).mean()


def mean_per_micro_batch(batch: Batch) -> Tensor:
    """`masked_mean(loss, mask)`, averaged over micro-batches."""
    return torch.stack([torch.cat(tuple(micro)).mean() for micro in batch]).mean()


def sum_over_padded_width(batch: Batch) -> Tensor:
    """Token sums over the width that this micro-batch happens to be padded to."""
    losses = [torch.cat(tuple(micro)).sum() / (len(micro) * max(map(len, micro))) for micro in batch]
    return torch.stack(losses).mean()


def sum_over(constant: float) -> Aggregate:
    """Token sums over a constant, averaged over responses and micro-batches of equal size."""

    def aggregate(batch: Batch) -> Tensor:
        return torch.stack(
            [torch.cat(tuple(micro)).sum() / (len(micro) * constant) for micro in batch]
        ).mean()

    return aggregate


def slipstream(kind: str) -> Aggregate:
    """Our own aggregation, through the function that training uses."""

    def aggregate(batch: Batch) -> Tensor:
        rows = [row for micro in batch for row in micro]
        size = StepSize(responses=len(rows), tokens=sum(map(len, rows)))
        total = torch.zeros((), dtype=torch.float64)
        for micro in batch:
            weights = sequence_weights(kind, torch.tensor([len(row) for row in micro]), size, BUDGET).double()
            total = total + sum(weight * row.sum() for weight, row in zip(weights, micro, strict=True))
        return total

    return aggregate


_RESPONSE = "mean over responses of Σ_t / |o_i|"
_MICRO_BATCH = "Σ / tokens of the micro-batch"
SUBJECTS: tuple[tuple[str, str, Aggregate], ...] = (
    # Table 2 of the paper, at the commits it names.
    ("trl 07cfe16 (ppo_trainer.py)", _MICRO_BATCH, mean_per_micro_batch),
    ("OpenRLHF 15d3151 (models/loss.py)", _RESPONSE, mean_per_response),
    ("verl c6dc8b7 (core_algos.py)", _MICRO_BATCH, mean_per_micro_batch),
    ("SimpleRL-Zero 41c9a89 (models/loss.py)", _RESPONSE, mean_per_response),
    ("Open-Reasoner-Zero e008f6d (ppo/actors.py)", _RESPONSE, mean_per_response),
    # Their unbiased options, and the trap in one of them.
    ("oat 0.0.9 (masked_sum, constant 1)", "Σ / N", sum_over(1.0)),
    ("trl, loss_type dr_grpo", "Σ / (N · max_completion_length)", sum_over(BUDGET)),
    ("verl, seq-mean-token-sum-norm, factor set", "Σ / (N · loss_scale_factor)", sum_over(BUDGET)),
    ("verl, seq-mean-token-sum-norm, factor null", "Σ / (N · padded width)", sum_over_padded_width),
    *(
        (f"slipstream {kind}", formula, slipstream(kind))
        for kind, formula in zip(
            AGGREGATIONS, ("Σ / (N · L)", "Σ_i Σ_t / (N · |o_i|)", "Σ / tokens of the step"), strict=True
        )
    ),
)


def length_bias_audit() -> list[AuditRow]:
    """Probe every aggregation in SUBJECTS; deterministic, milliseconds."""
    return [_audit(*subject) for subject in SUBJECTS]


def _audit(name: str, formula: str, aggregate: Aggregate) -> AuditRow:
    own = tuple(_token_gradient(aggregate, length, OTHER_LENGTH) for length in LENGTHS)
    other = [_token_gradient(aggregate, OTHER_LENGTH, length) for length in LENGTHS]
    whole, halves = (
        _token_gradient(aggregate, LENGTHS[0], LENGTHS[-1], split=split) for split in (False, True)
    )
    return AuditRow(name, formula, own, _exponent(own), _exponent(other), halves / whole)


def _token_gradient(aggregate: Aggregate, own: int, other: int, *, split: bool = False) -> float:
    """|∂loss/∂token| for the first response's tokens in a batch of two responses."""
    probed = torch.ones(own, dtype=torch.float64, requires_grad=True)
    neighbour = torch.ones(other, dtype=torch.float64)
    batch = [[probed], [neighbour]] if split else [[probed, neighbour]]
    (gradient,) = torch.autograd.grad(aggregate(batch), probed)
    return float(gradient[0].abs())


def _exponent(gradients: Sequence[float]) -> float:
    return math.log(gradients[-1] / gradients[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
