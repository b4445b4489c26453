"""Sums and means per sequence over packed response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Sum of `values` [T] for each of `count` sequences, given each token's sequence index [T] -> [count]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sequence, values)


def segment_mean(values: Tensor, sequence: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` [T] over the (unmasked) tokens of each sequence -> [count]; 0 where there are none."""
    ones = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    tokens = segment_sum(ones, sequence, count)
    return segment_sum(values * ones, sequence, count) / tokens.clamp(min=1)
