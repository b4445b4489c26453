"""Layout, footers, manifests and checksums: pure functions, checked against independent calculation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.weights import LinkError, Manifest, Snapshot, SupersededError, TensorSpec
from common.weights.checksum import CHUNK_WORDS, checksum
from common.weights.layout import ALIGNMENT, FOOTER_BYTES, plan_buckets, write_footer
from common.weights.transport import check_footer

DTYPES = ("float32", "bfloat16", "float16", "int64", "uint8")
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
specs = st.tuples(st.sampled_from(DTYPES), shapes)
manifests = st.lists(specs, min_size=1, max_size=20).map(
    lambda rows: Manifest(tuple(TensorSpec(f"p{i}", *row) for i, row in enumerate(rows)))
)


@given(manifests, st.integers(1, 4000))
def test_buckets_hold_every_tensor_once_in_order_without_overlap(manifest, size):
    buckets = plan_buckets(manifest, size)
    assert [slot.spec for bucket in buckets for slot in bucket.slots] == list(manifest.tensors)
    for bucket in buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.offset >= end
            assert slot.offset % ALIGNMENT == 0
            end = slot.offset + slot.spec.nbytes
        assert end <= bucket.payload == bucket.nbytes - FOOTER_BYTES
        assert bucket.payload <= size or len(bucket.slots) == 1


@given(manifests)
def test_a_manifest_survives_the_store(manifest):
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.difference(manifest) is None


def named(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer.{i}": torch.randn(shape, generator=generator)
        for i, shape in enumerate([(3, 5), (), (17,), (0, 4), (8, 8)])
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("layer.1"), r"layer\.1 of the engine's model is missing"),
        (lambda m: m.__setitem__("extra", torch.ones(1)), r"extra of the push is unknown"),
        (
            lambda m: m.__setitem__("layer.2", torch.ones(18)),
            r"layer\.2 has shape \[18\], the engine's has \[17\]",
        ),
        (lambda m: m.__setitem__("layer.2", torch.ones(17).half()), r"layer\.2 has dtype float16"),
    ],
)
def test_a_misfit_names_the_parameter(change, sentence):
    expected, other = named(), named()
    change(other)
    got = Snapshot.from_tensors(other.items()).manifest
    assert pytest.importorskip("re").search(
        sentence, got.difference(Snapshot.from_tensors(expected.items()).manifest)
    )


@given(st.integers(1, 500), st.sampled_from([None, torch.bfloat16]))
@settings(max_examples=20)
def test_a_snapshot_is_a_converted_copy(size, dtype):
    source = named()
    snapshot = Snapshot.from_tensors(source.items(), dtype=dtype, bucket_bytes=size)
    kept = {name: tensor.clone() for name, tensor in source.items()}
    for tensor in source.values():
        tensor.fill_(0)
    for name, tensor in snapshot.tensors():
        assert torch.equal(tensor, kept[name].to(dtype or torch.float32))


def test_footers_tell_truncated_foreign_and_superseded_buckets():
    snapshot = Snapshot.from_tensors(named().items(), bucket_bytes=128)
    snapshot.stamp(5)
    bucket, buffer = snapshot.layout[1], snapshot.buffer(1).clone()
    check_footer(buffer, bucket, 5)
    with pytest.raises(LinkError, match=r"bucket 1 of version 6 .* incomplete"):
        check_footer(buffer, bucket, 6)
    with pytest.raises(LinkError, match=r"from parameter layer\."):
        check_footer(buffer, snapshot.layout[0], 5)
    cut = buffer.clone()
    cut[cut.numel() // 2 :] = 0
    with pytest.raises(LinkError, match="incomplete"):
        check_footer(cut, bucket, 5)
    write_footer(buffer, 5, bucket, superseded=True)
    with pytest.raises(SupersededError):
        check_footer(buffer, bucket, 5)


def slow_checksum(data: bytes) -> str:
    """The same sum in Python's integers."""
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    odd, mask, total = 0x9E3779B97F4A7C15, (1 << 64) - 1, len(data)
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        total = (total * odd + sum(w * (2 * i + 1) * odd for i, w in enumerate(chunk))) & mask
    return f"{total:016x}"


@given(st.binary(max_size=200))
def test_checksum_is_the_sum_that_it_says(data):
    tensor = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    assert checksum(tensor) == slow_checksum(data)


def test_checksum_over_several_chunks():
    tensor = torch.arange(CHUNK_WORDS + 1000, dtype=torch.int64) * 7919
    assert checksum(tensor) == slow_checksum(tensor.numpy().tobytes())


@given(st.integers(0, 63), st.integers(0, 7))
def test_checksum_finds_any_flipped_bit_and_swap(index, bit):
    tensor = torch.randn(16, generator=torch.Generator().manual_seed(1)).view(torch.uint8)
    changed = tensor.clone()
    changed[index] ^= 1 << bit
    assert checksum(changed) != checksum(tensor)
    swapped = tensor.view(torch.int64)[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert checksum(swapped) != checksum(tensor)


def test_checksum_does_not_depend_on_layout_in_memory():
    tensor = torch.randn(6, 10)
    assert checksum(tensor.T) == checksum(tensor.T.contiguous())
    assert checksum(tensor.view(-1)[1:]) == checksum(tensor.view(-1)[1:].clone())
