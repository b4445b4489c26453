"""Sums and means per sequence over packed response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Sum of `values` [T] for each of `count` sequences, given each token's sequence index [T] -> [count]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sequence, values)


def segment_mean(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Mean of `values` [T] over the tokens of each sequence -> [count]; 0 where there are none."""
    tokens = segment_sum(torch.ones_like(values), sequence, count)
    return segment_sum(values, sequence, count) / tokens.clamp(min=1)
