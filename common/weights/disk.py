"""Weights through a shared folder: the last resort, and a first full copy for nodes without a network path.

Invariant: a file that can be seen under its final name is complete (written beside, synced, renamed); a
receiver never uses a file whose header, run or version is not what was offered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.weights.errors import Cause, LinkError
from common.weights.layout import Bucket, Slot
from common.weights.snapshot import Snapshot
from common.weights.transport import BufferPool, Source

KEPT = 2  # versions left on disk: the newest and the one that a slow reader may still be at
_POLL_S = 0.05  # network file systems show a new name late


class DiskSource(Source):
    """Writes each version once into `folder`; removes all but the last `KEPT`.

    Args:
        folder: on a file system that learner and actors share.
        run_id, token: written into each file and part of the sub-folder's name.
    """

    def __init__(self, folder: str | os.PathLike[str], run_id: str, token: str) -> None:
        for left_behind in Path(folder).glob(f"weights-{run_id}-*"):  # of a learner that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        self.folder = Path(folder) / f"weights-{run_id}-{token[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run_id = run_id
        self._files: deque[Path] = deque()

    def prepare(self, snapshot: Snapshot) -> None:
        final = self._path(snapshot)
        partial = final.with_suffix(".partial")
        tensors = {name: tensor.cpu() for name, tensor in snapshot.tensors()}
        try:
            save_file(tensors, partial, metadata={"run": self._run_id, "version": str(snapshot.version)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)
        self._files.append(final)
        while len(self._files) > KEPT:
            self._files.popleft().unlink(missing_ok=True)

    def ticket(self, snapshot: Snapshot, workers: int) -> dict[str, Any]:
        del workers
        return {"path": str(self._path(snapshot)), "run": self._run_id}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def _path(self, snapshot: Snapshot) -> Path:
        return self.folder / f"version-{snapshot.version}.safetensors"


def fetch_from_disk(
    ticket: dict[str, Any], layout: list[Bucket], version: int, pool: BufferPool, timeout: float
) -> list[torch.Tensor]:
    """Reads the offered file into buckets of `layout`.

    Raises:
        LinkError: DEADLINE when the file does not appear, FOREIGN_RUN or TRUNCATED when it is another one.
    """
    path = Path(ticket["path"])
    _await_file(path, timeout)
    buffers = []
    try:
        with safe_open(path, framework="pt", device=str(pool.device)) as file:
            _check_origin(file.metadata() or {}, ticket, version, path)
            for bucket in layout:
                buffers.append(pool.take(bucket.nbytes))
                for slot in bucket.slots:
                    _copy_tensor(file, slot, buffers[-1])
    except (SafetensorError, OSError) as error:
        raise LinkError(Cause.TRUNCATED, f"{path} cannot be read: {str(error)[:200]}") from None
    return buffers


def _await_file(path: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > end:
            raise LinkError(
                Cause.DEADLINE, f"{path} did not appear within {timeout:g} s: is the folder shared?"
            )
        time.sleep(_POLL_S)


def _check_origin(metadata: dict[str, str], ticket: dict[str, Any], version: int, path: Path) -> None:
    if metadata.get("run") != ticket["run"]:
        raise LinkError(
            Cause.FOREIGN_RUN, f"{path} belongs to run {metadata.get('run')}, not {ticket['run']}"
        )
    if metadata.get("version") != str(version):
        raise LinkError(Cause.TRUNCATED, f"{path} holds version {metadata.get('version')}, not {version}")


def _copy_tensor(file: Any, slot: Slot, buffer: torch.Tensor) -> None:
    tensor, target = file.get_tensor(slot.spec.name), slot.view(buffer)
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        raise LinkError(Cause.TRUNCATED, f"parameter {slot.spec.name} on disk is not as offered")
    target.copy_(tensor)
