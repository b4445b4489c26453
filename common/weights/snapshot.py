"""A frozen copy of the policy, packed into buckets, from which every link is served.

Invariant: a snapshot's bytes never change after `build`; `release` gives the memory back at once, except for
the bucket that a stuck link is still sending.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

import torch

from common.weights.checksum import checksum
from common.weights.errors import SupersededError
from common.weights.layout import (
    ALIGNMENT,
    DEFAULT_BUCKET_BYTES,
    Bucket,
    Manifest,
    manifest_of,
    plan_buckets,
    write_footer,
)


class Snapshot:
    """Packed buckets of one set of weights (see `SnapshotBuilder`).

    Attributes:
        manifest: names, dtypes and shapes as sent.
        layout: the buckets, `plan_buckets(manifest, bucket_bytes)`.
        bucket_bytes: the size that the layout was planned with.
        checksums: per parameter name, or None until `add_checksums`.
    """

    def __init__(
        self, manifest: Manifest, layout: list[Bucket], bucket_bytes: int, buffers: list[torch.Tensor]
    ) -> None:
        self.manifest = manifest
        self.layout = layout
        self.bucket_bytes = bucket_bytes
        self.checksums: dict[str, str] | None = None
        self.version: int | None = None
        self._buffers: list[torch.Tensor] | None = buffers
        self._lock = threading.Lock()

    @classmethod
    def from_tensors(
        cls,
        named: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        device: torch.device | str = "cpu",
    ) -> Snapshot:
        """Copies whole tensors that are already in memory (no ZeRO-3); one copy in all."""
        tensors = dict(named)
        builder = SnapshotBuilder(manifest_of(tensors.items(), dtype), bucket_bytes, device)
        for bucket in builder.layout:
            builder.fill(bucket, tensors)
        return builder.build()

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, footers included."""
        return sum(bucket.nbytes for bucket in self.layout)

    @property
    def device(self) -> torch.device:
        return self.buffer(0).device

    def stamp(self, version: int) -> None:
        """Writes the footers. Called once, by the publisher, before anything is sent."""
        self.version = version
        for bucket in self.layout:
            write_footer(self.buffer(bucket.index), version, bucket)

    def buffer(self, index: int) -> torch.Tensor:
        """Bucket `index`, uint8 of shape (bucket.nbytes,). Raises `SupersededError` after `release`."""
        with self._lock:
            if self._buffers is None:
                raise SupersededError(-1 if self.version is None else self.version)
            return self._buffers[index]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter by name, as a view into its bucket."""
        for bucket in self.layout:
            buffer = self.buffer(bucket.index)
            for slot in bucket.slots:
                yield slot.spec.name, slot.view(buffer)

    def add_checksums(self) -> dict[str, str]:
        """Checksum of every parameter as sent; computed once."""
        if self.checksums is None:
            self.checksums = {name: checksum(tensor) for name, tensor in self.tensors()}
        return self.checksums

    @property
    def released(self) -> bool:
        return self._buffers is None

    def release(self) -> None:
        """Gives the memory back; whoever still asks for a bucket gets `SupersededError`."""
        with self._lock:
            self._buffers = None


class SnapshotBuilder:
    """Fills a snapshot bucket by bucket, so that the source need never be whole in memory (ZeRO-3).

    Args:
        manifest: what will be filled in, with the dtypes to send.
        bucket_bytes: upper bound of a bucket's payload (a larger tensor gets its own bucket).
        device: where the copy lives: "cpu" for gloo, disk and shared memory, a GPU for NCCL and CUDA IPC.
        pinned: host memory that a GPU copies to and from at full speed.
    """

    def __init__(
        self,
        manifest: Manifest,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        device: torch.device | str = "cpu",
        *,
        pinned: bool = False,
    ) -> None:
        self.manifest = manifest
        self.bucket_bytes = bucket_bytes
        self._pinned = pinned
        self.layout = plan_buckets(manifest, bucket_bytes)
        self._buffers: list[torch.Tensor] = []
        self._device = torch.device(device)
        self._arena: torch.Tensor | None = None

    @torch.no_grad()
    def fill(self, bucket: Bucket, sources: Mapping[str, torch.Tensor]) -> None:
        """Copies (and converts) the tensors of `bucket`, which must be the next one in order."""
        if bucket.index != len(self._buffers):
            raise ValueError(f"bucket {bucket.index} filled out of order")
        buffer = self._buffer(bucket)
        for slot in bucket.slots:
            source = sources[slot.spec.name]
            if tuple(source.shape) != slot.spec.shape:
                raise ValueError(f"parameter {slot.spec.name} has shape {tuple(source.shape)} when gathered")
            slot.view(buffer).copy_(source)
        self._buffers.append(buffer)

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        if not self._pinned:
            return torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
        # One block for all buckets: torch rounds each pinned block up to a power of two (14 GiB of a 7B model in
        # buckets of 129 to 1039 MiB would take 25 GiB), and gives it back whole to the next version.
        sizes = [-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in self.layout]
        if self._arena is None:
            self._arena = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        start = sum(sizes[: bucket.index])
        return self._arena[start : start + bucket.nbytes]

    def build(self) -> Snapshot:
        """The finished snapshot; device copies are complete when it returns."""
        if len(self._buffers) != len(self.layout):
            raise ValueError("not all buckets were filled")
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Snapshot(self.manifest, self.layout, self.bucket_bytes, self._buffers)
