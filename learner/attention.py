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

import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PACKED = "slipstream_packed"

# Padding a segment costs its tokens; one more rectangle costs a handful of kernel launches per layer.
MAX_PADDED_SHARE = 0.1


class Segments:
    """Where the segments of one packed row lie; built once per forward and used by every layer.

    Args:
        lengths: tokens of each segment, in order, each at least 1.
        device: where the activations are.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.lengths = tuple(lengths)
        self.total = sum(lengths)
        self.longest = max(lengths)
        self.device = device

    @cached_property
    def bounds(self) -> Tensor:
        """[n + 1] int32: first column of each segment, and the end of the row."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(device=self.device, dtype=torch.int32)

    @cached_property
    def rectangles(self) -> Rectangles:
        """Segments of similar length side by side, padded at their end."""
        shapes, gather = [], []
        scatter = torch.empty(self.total, dtype=torch.int64)
        starts, filled = torch.tensor([0, *self.lengths]).cumsum(0), 0
        for group in group_by_length(self.lengths):
            length = torch.tensor([self.lengths[segment] for segment in group])[:, None]
            column = torch.arange(int(length.max()))[None]
            # Padding repeats the segment's last token: any column would do, nothing real looks behind itself.
            index = starts[group][:, None] + torch.minimum(column, length - 1)
            real = column < length
            scatter[index[real]] = filled + real.flatten().nonzero().squeeze(1)
            filled += index.numel()
            shapes.append(tuple(index.shape))
            gather.append(index.flatten())
        return Rectangles(tuple(shapes), torch.cat(gather).to(self.device), scatter.to(self.device))


class Rectangles(NamedTuple):
    """A row of S tokens as rectangles of P ≥ S places laid end to end.

    `shapes` are (segments, width) of each; `gather` [P] names the column that fills each place; `scatter` [S] the
    place of each column.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor
    scatter: Tensor


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that transformers' AttentionInterface calls.

    Args:
        query: [1, query heads, S, head size]; key and value: [1, key heads, S, head size].
        segments: of this row; passed as a keyword of the model's forward.

    Returns:
        ([1, S, query heads, head size], None).

    Raises:
        ValueError: no segments, several rows, segments that do not fill the row, or a form of attention that this
            is not: a sliding window shorter than the longest segment, soft-capped scores, attention sinks.
    """
    if segments is None or query.shape[0] != 1 or query.shape[2] != segments.total:
        raise ValueError("packed attention needs one row and `segments` whose lengths sum to its width")
    if sliding_window is not None and sliding_window < segments.longest:
        raise ValueError(
            f"sliding window {sliding_window} is shorter than a sample of {segments.longest} tokens"
        )
    if softcap is not None or s_aux is not None:
        raise ValueError("packed attention has neither soft-capped scores nor attention sinks")
    kernel = _flash_kernel(query.device) if query.is_cuda else None
    if kernel and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _variable_length(kernel, query, key, value, segments, scaling), None
    return _rectangular(query, key, value, segments, scaling, dropout), None


@cache
def _flash_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """torch's variable-length attention, where this build and this GPU (Ampere or later) have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    fits = {"window_size", "enable_gqa", "scale"} <= known.keys()
    return varlen_attn if fits and torch.cuda.get_device_capability(device) >= (8, 0) else None


def _variable_length(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
) -> Tensor:
    # [1, heads, S, size] -> [S, heads, size]
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds, longest = segments.bounds, segments.longest
    grouped = query.shape[1] != key.shape[1]
    causal = (-1, 0)  # any number of keys to the left, none to the right
    return kernel(
        *rows, bounds, bounds, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped
    )[None]


def _rectangular(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, dropout: float
) -> Tensor:
    shapes, gather, scatter = segments.rectangles
    sizes = [rows * width for rows, width in shapes]
    # Whole rows of [S, heads, size] are copied: far cheaper in backward than indexing inside each head.
    places = [
        tensor[0].transpose(0, 1).index_select(0, gather).split(sizes) for tensor in (query, key, value)
    ]
    outputs = []
    for shape, *parts in zip(shapes, *places, strict=True):
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, scatter)[None]


def register() -> str:
    """Make PACKED known to transformers (idempotent) and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
    return PACKED


def _no_mask(*_: Any, **__: Any) -> None:
    """The segments already say who sees whom; a dense mask would cost the row squared."""
