"""Weights to a receiver on the same machine without a network: CUDA IPC on one GPU, shared memory on the CPU.

Invariant: the receiver copies out of the shared memory while it stages and keeps no reference to it, so the
learner may drop a version at any time; a copy that was overtaken fails its footer and is not used.
"""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path
from typing import Any

import psutil
import torch

from common.weights.errors import Cause, LinkError, SupersededError
from common.weights.layout import Bucket
from common.weights.snapshot import Snapshot
from common.weights.transport import BufferPool, Source, check_footer

SHARED_MEMORY = Path("/dev/shm")
_OURS = "slipstream-weights-"  # then the process id and the token


class SharedMemorySource(Source):
    """One file in `/dev/shm` per version, buckets one after the other (CPU)."""

    def __init__(self, token: str, folder: Path = SHARED_MEMORY) -> None:
        self._folder = folder
        self._prefix = f"{_OURS}{os.getpid()}-{token}-"
        for path in folder.glob(f"{_OURS}*"):
            if not psutil.pid_exists(int(path.name.removeprefix(_OURS).partition("-")[0])):
                path.unlink(missing_ok=True)  # of a learner that was killed

    def prepare(self, snapshot: Snapshot) -> None:
        path = self._path(snapshot.version)
        try:
            shared = _map_file(path, snapshot.nbytes, create=True)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        offset = 0
        for bucket in snapshot.layout:
            shared[offset : offset + bucket.nbytes].copy_(snapshot.buffer(bucket.index))
            offset += bucket.nbytes

    def ticket(self, snapshot: Snapshot, workers: int) -> dict[str, Any]:
        del workers
        return {"path": str(self._path(snapshot.version)), "nbytes": snapshot.nbytes}

    def retire(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)  # mapped copies stay valid

    def close(self) -> None:
        for path in self._folder.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, version: int | None) -> Path:
        return self._folder / f"{self._prefix}{version}"


class CudaIpcSource(Source):
    """A CUDA IPC handle per bucket and worker: each handle carries one reference that its receiver gives back."""

    def ticket(self, snapshot: Snapshot, workers: int) -> dict[str, Any]:
        indices = range(len(snapshot.layout))
        return {"handles": [[_share(snapshot.buffer(i)) for i in indices] for _ in range(workers)]}


def fetch_shared(
    ticket: dict[str, Any], layout: list[Bucket], version: int, pool: BufferPool, rank: int
) -> list[torch.Tensor]:
    """Copies all buckets out of the sender's memory.

    Raises:
        LinkError: TRUNCATED when the segment is gone, too small or not this version.
    """
    sources = _from_cuda(ticket, rank) if "handles" in ticket else _from_file(ticket, layout)
    buffers = []
    for bucket, source in zip(layout, sources, strict=True):
        if source.numel() < bucket.nbytes:
            raise LinkError(
                Cause.TRUNCATED, f"shared bucket {bucket.index} holds {source.numel()} bytes only"
            )
        buffers.append(pool.take(bucket.nbytes))
        buffers[-1].copy_(source[: bucket.nbytes])
        check_footer(buffers[-1], bucket, version)
    if pool.device.type == "cuda":
        torch.cuda.current_stream(pool.device).synchronize()
    return buffers


def _from_file(ticket: dict[str, Any], layout: list[Bucket]) -> list[torch.Tensor]:
    path = Path(ticket["path"])
    if not path.exists():  # removed between offer and fetch
        raise SupersededError(-1)
    found = os.path.getsize(path)
    if found != ticket["nbytes"]:
        raise LinkError(Cause.TRUNCATED, f"{path} holds {found} bytes, not {ticket['nbytes']}")
    shared = _map_file(path, ticket["nbytes"], create=False)
    return list(shared.split([bucket.nbytes for bucket in layout]))


def _map_file(path: Path, nbytes: int, *, create: bool) -> torch.Tensor:
    if create:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # a full /dev/shm is an error here, not SIGBUS later
        finally:
            os.close(descriptor)
    return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)


def _share(buffer: torch.Tensor) -> dict[str, Any]:
    """The handle of `buffer`'s storage in JSON values; a storage may start inside a larger allocation."""
    fields = buffer.untyped_storage()._share_cuda_()
    packed = [base64.b64encode(f).decode() if isinstance(f, bytes) else f for f in fields]
    return {"storage": packed, "offset": buffer.storage_offset(), "nbytes": buffer.numel()}


def _from_cuda(ticket: dict[str, Any], rank: int) -> list[torch.Tensor]:
    return [_open(handle) for handle in ticket["handles"][rank]]


def _open(handle: dict[str, Any]) -> torch.Tensor:
    fields = [base64.b64decode(f) if isinstance(f, str) else f for f in handle["storage"]]
    storage = torch.UntypedStorage._new_shared_cuda(*fields)
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole[handle["offset"] : handle["offset"] + handle["nbytes"]]
