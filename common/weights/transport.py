"""The four routes behind one interface: how the bytes of a staged version reach a receiver.

Invariant: control (offers, acknowledgements, deadlines) is the same for all routes; a route only moves bytes.
Whatever it returns is complete, or it raised.

    gloo, nccl   broadcasts over a link's own group, host or device memory; receivers can relay
    ipc          the same machine: a CUDA IPC handle per bucket, or a shared-memory file on the CPU
    disk         one safetensors file in a shared folder, written once, renamed into place
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from common.weights.errors import Cause, LinkError, SupersededError
from common.weights.group import Group
from common.weights.layout import MAGIC, SUPERSEDED_INDEX, Bucket, read_footer, write_footer
from common.weights.snapshot import Snapshot


class Source(ABC):
    """The learner's end of a route. Called from the publisher's threads, never from the learner's step."""

    uses_groups = False

    def prepare(self, snapshot: Snapshot) -> None:
        """Work needed once per version before it can be offered (writing a file)."""
        del snapshot

    @abstractmethod
    def ticket(self, snapshot: Snapshot, workers: int) -> dict[str, Any]:
        """What a link of `workers` ranks needs to fetch `snapshot`; part of the offer, JSON values only."""

    def retire(self, version: int) -> None:
        """The version is no longer offered; what receivers have opened must stay readable to them."""
        del version

    def close(self) -> None:
        """Removes whatever the route left outside this process."""
        return


class GroupSource(Source):
    """Route over process groups: the bytes go through `send_buckets`."""

    uses_groups = True

    def ticket(self, snapshot: Snapshot, workers: int) -> dict[str, Any]:
        del snapshot, workers
        return {}


class BufferPool:
    """Keeps the staging buffers of one receiver between pushes: fresh pages cost more than the copy.

    Only host memory is kept; on a GPU the caching allocator does this, and the memory is worth more free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer of exactly `nbytes`, with a footer that is not valid."""
        kept = self._free.get(nbytes)
        buffer = kept.pop() if kept else torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        buffer[-8:].zero_()
        return buffer

    def give_back(self, buffers: list[torch.Tensor]) -> None:
        if self.device.type == "cpu":
            for buffer in buffers:
                self._free.setdefault(buffer.numel(), []).append(buffer)

    def clear(self) -> None:
        self._free.clear()


def send_buckets(
    group: Group, layout: list[Bucket], bucket_of: Callable[[int], torch.Tensor], version: int, timeout: float
) -> None:
    """Broadcasts every bucket in order from rank 0; one that is kept in host memory is brought to the device first.

    When the snapshot is released under way, one more bucket says so and the link stays usable.

    Raises:
        SupersededError: the version was given up; the receivers were told.
        LinkError: the link is closed.
    """
    for bucket in layout:
        try:
            buffer = bucket_of(bucket.index)
        except SupersededError:
            notice = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=group.device)
            write_footer(notice, version, bucket, superseded=True)
            group.broadcast(notice, timeout)
            raise
        group.broadcast(buffer.to(group.device, non_blocking=True), timeout)


def receive_buckets(
    group: Group, layout: list[Bucket], version: int, pool: BufferPool, timeout: float
) -> list[torch.Tensor]:
    """Receives every bucket in order and checks its footer.

    Raises:
        SupersededError: the sender gave the version up; the link stays usable.
        LinkError: anything else; the link is closed.
    """
    buffers: list[torch.Tensor] = []
    try:
        for bucket in layout:
            buffers.append(pool.take(bucket.nbytes))
            group.broadcast(buffers[-1], timeout)
            check_footer(buffers[-1], bucket, version)
    except SupersededError:
        pool.give_back(buffers)
        raise
    return buffers


def check_footer(buffer: torch.Tensor, bucket: Bucket, version: int) -> None:
    """Raises `LinkError` (TRUNCATED) unless `buffer` is bucket `bucket.index` of `version`, complete."""
    magic, got_version, index, payload = read_footer(buffer)
    if magic == MAGIC and index == SUPERSEDED_INDEX:
        raise SupersededError(version)
    if (magic, got_version, index, payload) != (MAGIC, version, bucket.index, bucket.payload):
        first = bucket.slots[0].spec.name
        raise LinkError(
            Cause.TRUNCATED,
            f"bucket {bucket.index} of version {version} (from parameter {first} on) arrived incomplete "
            f"or out of order",
        )
