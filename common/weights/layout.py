"""What is sent and how it is cut into buckets: a pure function of names, dtypes and shapes.

Invariant: sender and receiver compute the same layout from the same manifest and bucket size, so that only
the manifest travels ahead of the data, and every bucket ends in a footer that says which version and which
bucket it is. A bucket without its footer is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

ALIGNMENT = 64  # bytes; tensors start on cache lines, which vectorised copies and int64 views need
FOOTER_BYTES = 32  # four int64: magic, version, bucket index, payload bytes
MAGIC = 0x534C50_57454947  # "SLP" "WEIG"
SUPERSEDED_INDEX = -1  # footer index of a bucket that only says: this version was given up

DEFAULT_BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class TensorSpec:
    """One parameter as it is sent. `dtype` is a torch dtype's short name, such as "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """All parameters of a push, in sending order.

    `kind` is "full" (a checkpoint's parameters, tied weights once) or "adapter" (a peft LoRA adapter, whose
    configuration is in `meta`).
    """

    tensors: tuple[TensorSpec, ...]
    kind: str = "full"
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        rows = [[spec.name, spec.dtype, list(spec.shape)] for spec in self.tensors]
        return json.dumps({"kind": self.kind, "meta": self.meta, "tensors": rows}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        body = json.loads(text)
        specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in body["tensors"])
        return cls(specs, body["kind"], body["meta"])

    def difference(self, expected: Manifest) -> str | None:
        """One sentence naming the first parameter that does not fit `expected`; None when all fit.

        The order of the parameters is free; names, shapes and dtypes are not.
        """
        offered = {spec.name: spec for spec in self.tensors}
        wanted = {spec.name: spec for spec in expected.tensors}
        for name in wanted:
            if name not in offered:
                return f"parameter {name} of the engine's model is missing from the push"
        for name in offered:
            if name not in wanted:
                return f"parameter {name} of the push is unknown to the engine's model"
        for name, spec in offered.items():
            if spec.shape != wanted[name].shape:
                return f"parameter {name} has shape {list(spec.shape)}, the engine's has {list(wanted[name].shape)}"
            if spec.dtype != wanted[name].dtype:
                return f"parameter {name} has dtype {spec.dtype}, the engine's has {wanted[name].dtype}"
        return None


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in its bucket: `spec.nbytes` bytes from `offset`."""

    spec: TensorSpec
    offset: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor inside `buffer` (uint8, shape (bucket.nbytes,)), sharing its memory."""
        raw = buffer[self.offset : self.offset + self.spec.nbytes]
        return raw.view(getattr(torch, self.spec.dtype)).view(self.spec.shape)


@dataclass(frozen=True)
class Bucket:
    """One message: whole tensors, then the footer. `nbytes` includes the footer."""

    index: int
    slots: tuple[Slot, ...]
    payload: int

    @property
    def nbytes(self) -> int:
        return self.payload + FOOTER_BYTES


def plan_buckets(manifest: Manifest, bucket_bytes: int) -> list[Bucket]:
    """Packs whole tensors, in order, into buckets of at most `bucket_bytes`.

    A tensor larger than `bucket_bytes` gets a bucket of its own. Payloads are multiples of `ALIGNMENT`.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = 0
    for spec in manifest.tensors:
        padded = -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        if slots and used + padded > bucket_bytes:
            buckets.append(Bucket(len(buckets), tuple(slots), used))
            slots, used = [], 0
        slots.append(Slot(spec, used))
        used += padded
    if slots:
        buckets.append(Bucket(len(buckets), tuple(slots), used))
    return buckets


def manifest_of(named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> Manifest:
    """The manifest of `named` tensors; floating-point ones as they will be sent, converted to `dtype`."""
    return Manifest(tuple(TensorSpec(name, sent_dtype(t.dtype, dtype), tuple(t.shape)) for name, t in named))


def sent_dtype(source: torch.dtype, target: torch.dtype | None) -> str:
    """Short name of the dtype a tensor of `source` dtype travels in; integers are never converted."""
    chosen = target if target is not None and source.is_floating_point else source
    return str(chosen).removeprefix("torch.")


def write_footer(buffer: torch.Tensor, version: int, bucket: Bucket, *, superseded: bool = False) -> None:
    """Stamps `buffer` (uint8, (bucket.nbytes,)) as bucket `bucket.index` of `version`."""
    index = SUPERSEDED_INDEX if superseded else bucket.index
    words = torch.tensor([MAGIC, version, index, bucket.payload], dtype=torch.int64)
    buffer[-FOOTER_BYTES:].copy_(words.view(torch.uint8))


def read_footer(buffer: torch.Tensor) -> tuple[int, int, int, int]:
    """(magic, version, index, payload bytes) at the end of `buffer`."""
    magic, version, index, payload = buffer[-FOOTER_BYTES:].cpu().view(torch.int64).tolist()
    return magic, version, index, payload
