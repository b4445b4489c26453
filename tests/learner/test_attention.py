"""Packed attention equals attention sample by sample, forward and backward, and refuses to guess."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learner.attention import Segments, _variable_length, group_by_length, packed_attention, register

MODULE = nn.Module()


def one_by_one(query, key, value, lengths, scale):
    """Textbook softmax attention within each segment, grouped heads repeated."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    parts = []
    for q, k, v in zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True):
        scores = q @ k.transpose(-1, -2) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


def random_heads(total, heads, generator):
    return torch.randn((1, heads, total, 8), dtype=torch.float64, generator=generator).requires_grad_()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 9))
def test_equals_each_segment_by_itself(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    query = random_heads(sum(lengths), 4, generator)
    key, value = (random_heads(sum(lengths), 2, generator) for _ in range(2))
    cotangent = torch.randn((1, sum(lengths), 4, 8), dtype=torch.float64, generator=generator)
    expected = one_by_one(query, key, value, lengths, 0.3)
    wanted = torch.autograd.grad((expected * cotangent).sum(), (query, key, value))
    segments = Segments(lengths, "cpu")
    got, weights = packed_attention(MODULE, query, key, value, None, scaling=0.3, segments=segments)
    assert weights is None
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad((got * cotangent).sum(), (query, key, value)), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.floats(0, 0.9))
def test_groups_partition_the_segments_and_bound_the_padding(lengths, share):
    groups = group_by_length(lengths, share)
    assert sorted(segment for group in groups for segment in group) == list(range(len(lengths)))
    for group in groups:
        width = max(lengths[segment] for segment in group)
        real = sum(lengths[segment] for segment in group)
        assert real >= (1 - share) * width * len(group) * (1 - 1e-12)


def test_equal_lengths_share_one_rectangle_without_padding():
    rectangles = Segments([7] * 50, "cpu").rectangles
    assert rectangles.shapes == ((50, 7),)
    assert rectangles.gather.tolist() == list(range(350))


@pytest.mark.parametrize("segments", [None, Segments([3, 3], "cpu")])
def test_a_row_without_matching_segments_is_refused(segments):
    heads = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="segments"):
        packed_attention(MODULE, heads, heads, heads, None, segments=segments)


def test_a_sliding_window_that_would_cut_a_sample_is_refused():
    heads = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="sliding window 3"):
        packed_attention(MODULE, heads, heads, heads, None, segments=Segments([5], "cpu"), sliding_window=3)
    packed_attention(MODULE, heads, heads, heads, None, segments=Segments([3, 2], "cpu"), sliding_window=3)


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_other_forms_of_attention_are_refused(extra):
    heads = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="soft-capped"):
        packed_attention(MODULE, heads, heads, heads, None, segments=Segments([5], "cpu"), **extra)


def flash_like(query, key, value, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of varlen_attn, for causal windows, written out."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    lengths = bounds_q.diff().tolist()
    assert max(lengths) == max_q == max_k
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return one_by_one(query, key, value, lengths, scale)[0]


def test_what_the_flash_kernel_is_handed():
    lengths, generator = [3, 9, 1], torch.Generator().manual_seed(0)
    query, key = random_heads(13, 4, generator), random_heads(13, 2, generator)
    segments = Segments(lengths, "cpu")
    got = _variable_length(flash_like, query, key, key, segments, 0.3)
    expected, _ = packed_attention(MODULE, query, key, key, None, scaling=0.3, segments=segments)
    torch.testing.assert_close(got, expected)


def test_registering_twice_is_harmless():
    assert register() == register()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length flash attention is CUDA only")
def test_variable_length_kernel_equals_rectangles():
    lengths = [5, 130, 64, 1]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, 4, 200, 64), (1, 2, 200, 64), (1, 2, 200, 64))
    heads = [torch.randn(s, device="cuda", generator=generator).requires_grad_() for s in shapes]
    segments = Segments(lengths, "cuda")
    exact, _ = packed_attention(MODULE, *heads, None, segments=segments)
    half, _ = packed_attention(MODULE, *(h.bfloat16() for h in heads), None, segments=segments)
    torch.testing.assert_close(half.float(), exact, rtol=3e-2, atol=3e-2)
    wanted = torch.autograd.grad(exact.square().sum(), heads)
    for ours, theirs in zip(torch.autograd.grad(half.float().square().sum(), heads), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=6e-2, atol=1e-1)
