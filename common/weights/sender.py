"""One thread per link that the learner serves itself: opens the group and sends, and reports how it went.

Invariant: whatever blocks, blocks here and ends at its deadline; the learner's step and the other links never
wait for it. A sender holds at most one bucket of a version that was given up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.weights.errors import Cause, LinkError, SupersededError
from common.weights.group import Group, use_own_stream
from common.weights.protocol import edge_name
from common.weights.snapshot import Snapshot
from common.weights.store import Address, connect
from common.weights.transport import send_buckets


@dataclass(frozen=True)
class SendReport:
    """Outcome of one send. `error` is None when all buckets were handed to the network."""

    link: str
    push: int
    seconds: float
    nbytes: int
    error: LinkError | None


class LinkSender:
    """Sends versions to one link, one after the other.

    Args:
        address: of the store, in which the group's ranks find one another.
        link, workers: the receiver.
        device: of the snapshots.
        deadline_s: for joining and for each bucket.
        report: called from the sender's thread after each send.
    """

    def __init__(
        self,
        address: Address,
        link: str,
        workers: int,
        device: torch.device,
        deadline_s: float,
        report: Callable[[SendReport], None],
    ) -> None:
        self._address = address
        self._link = link
        self._workers = workers
        self._device = device
        self._deadline_s = deadline_s
        self._report = report
        self._jobs: queue.SimpleQueue[tuple[int, Snapshot] | None] = queue.SimpleQueue()
        self._group: Group | None = None
        self._lock = threading.Lock()  # between `close` and the opening of the group
        self._closed = False
        threading.Thread(target=self._run, name="weights-send", daemon=True).start()

    def send(self, push: int, snapshot: Snapshot) -> None:
        """Queues a version; returns at once."""
        self._jobs.put((push, snapshot))

    def close(self) -> None:
        """Ends the thread and aborts a transfer under way: on a GPU it would else occupy it. Never blocks."""
        with self._lock:
            self._closed = True
            group = self._group
        self._jobs.put(None)
        if group is not None:
            group.close()

    def _run(self) -> None:
        use_own_stream(self._device)
        while not self._closed and (job := self._jobs.get()) is not None:
            push, snapshot = job
            started = time.perf_counter()
            error = self._try_send(snapshot)
            seconds = time.perf_counter() - started
            if not self._closed:
                self._report(SendReport(self._link, push, seconds, snapshot.nbytes, error))
            del job, snapshot  # an idle sender holds no version
            if error is not None and not isinstance(error, SupersededError):
                break
        if self._group is not None:
            self._group.close()

    def _try_send(self, snapshot: Snapshot) -> LinkError | None:
        try:
            group = self._open()
            assert snapshot.version is not None
            send_buckets(group, snapshot.layout, snapshot.buffer, snapshot.version, self._deadline_s)
        except LinkError as error:
            return error
        except (RuntimeError, dist.DistError) as error:
            return LinkError(Cause.PEER_LOST, f"{type(error).__name__}: {str(error)[:200]}")
        return None

    def _open(self) -> Group:
        if self._group is None:
            store = dist.PrefixStore(self._address.token, connect(self._address, self._deadline_s))
            name, world = edge_name(None, self._link), 1 + self._workers
            group = Group(store, name, 0, world, self._device, self._deadline_s, self._address.host)
            with self._lock:
                self._group = group
                closed = self._closed
            if closed:
                group.close()
        return self._group
