"""Causal attention inside each segment of a packed row, at the cost of the segments and not of the row squared.

Invariant: no token sees another sample's tokens, and outputs and gradients equal those of running each sample
by itself (up to floating-point order). A Hugging Face model is told to use it by
`model.set_attn_implementation(PACKED)`; each forward then passes `segments=Segments(...)`, and a forward without
segments is refused instead of silently attending across samples.

On CUDA with half-precision activations it is torch's variable-length flash attention. Elsewhere segments of
similar length are padded at their end into a few rectangles and go through scaled-dot-product attention: under a
causal mask no real token sees the padding behind it, so that this is exact and needs no mask tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PACKED = "slipstream_packed"

# Padding a segment costs its tokens; one more rectangle costs a handful of kernel launches per layer.
MAX_PADDED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Segments padded to one length: `index` [rows, width] int64 columns of the packed row."""

    index: Tensor


class Segments:
    """Where the segments of one packed row lie; built once per forward and used by every layer.

    Args:
        lengths: tokens of each segment, in order, each at least 1.
        device: where the activations are.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.longest = max(lengths)
        self.total = sum(lengths)
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        self.bounds = ends.to(device=device, dtype=torch.int32)
        self._lengths = list(lengths)
        self._starts = ends[:-1].tolist()
        self._device = device
        self._rectangles: list[Rectangle] | None = None
        self._inverse: Tensor | None = None

    @property
    def rectangles(self) -> tuple[list[Rectangle], Tensor]:
        """The rectangles, and for each column of the row its place in the rectangles laid end to end ([S])."""
        if self._rectangles is None:
            self._build()
        return self._rectangles, self._inverse

    def _build(self) -> None:
        self._rectangles, inverse = [], torch.empty(self.total, dtype=torch.int64)
        offset = 0
        for group in group_by_length(self._lengths):
            lengths = torch.tensor([self._lengths[segment] for segment in group])
            starts = torch.tensor([self._starts[segment] for segment in group])
            column = torch.arange(int(lengths.max()))
            # Padding repeats the segment's last token: any valid column would do, nothing real reads it.
            index = starts[:, None] + torch.minimum(column[None], lengths[:, None] - 1)
            real = column[None] < lengths[:, None]
            inverse[index[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += index.numel()
            self._rectangles.append(Rectangle(index.to(self._device)))
        self._inverse = inverse.to(self._device)


def group_by_length(lengths: Sequence[int], max_padded_share: float = MAX_PADDED_SHARE) -> list[list[int]]:
    """Group segments of similar length, longest first, padding at most `max_padded_share` of a rectangle."""
    groups: list[list[int]] = []
    real = 0
    for segment in sorted(range(len(lengths)), key=lambda segment: (-lengths[segment], segment)):
        width = lengths[groups[-1][0]] if groups else 0
        if groups and real + lengths[segment] >= (1 - max_padded_share) * width * (len(groups[-1]) + 1):
            groups[-1].append(segment)
            real += lengths[segment]
        else:
            groups.append([segment])
            real = lengths[segment]
    return groups


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that transformers' AttentionInterface calls.

    Args:
        query: [1, query heads, S, head size]; key and value: [1, key heads, S, head size].
        segments: of this row; passed as a keyword of the model's forward.

    Returns:
        ([1, S, query heads, head size], None).

    Raises:
        ValueError: no segments, several rows, segments that do not fill the row, or a sliding window shorter
            than the longest segment.
    """
    if segments is None or query.shape[0] != 1 or query.shape[2] != segments.total:
        raise ValueError("packed attention needs one row and `segments` whose lengths sum to its width")
    if sliding_window is not None and sliding_window < segments.longest:
        raise ValueError(
            f"sliding window {sliding_window} is shorter than a sample of {segments.longest} tokens"
        )
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _variable_length(query, key, value, segments, scaling), None
    return _rectangular(query, key, value, segments, scaling, dropout), None


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # present in CUDA builds only where flash attention is

    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds, longest = segments.bounds, segments.longest
    return varlen_attn(
        *rows, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )[None]  # fmt: skip


def _rectangular(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, dropout: float
) -> Tensor:
    rectangles, inverse = segments.rectangles
    outputs = []
    for rectangle in rectangles:
        # [heads, rows, width, size] -> [rows, heads, width, size]
        q, k, v = (tensor[0][:, rectangle.index].transpose(0, 1) for tensor in (query, key, value))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[inverse][None]


def register() -> str:
    """Make PACKED known to transformers (idempotent) and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
    return PACKED


def _no_mask(*_: Any, **__: Any) -> None:
    """The segments already say who sees whom; a dense mask would cost the row squared."""
