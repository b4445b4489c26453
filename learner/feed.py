"""The next batch, fetched and packed while the current one trains.

Invariant: every rank gets the same sequence of items (batches, and signs that there is none yet), so that what
the training loop decides after each item is decided alike everywhere. Rank 0 asks the broker; each rank fetches
the payload of its own rows over its own connection. At most one batch is taken ahead: more would only make its
tokens older (I1). An outage of the broker shows as waiting, never as an error (I4).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.codec import decode, encode
from common.errors import RunFailedError
from common.messages import Batch, Fetch, GroupId, Take
from common.wire import BrokerUnreachable, Client, RefusedError
from learner.batch import Payload
from learner.link import HistoryLost
from learner.ranks import Ranks

log = logging.getLogger("slipstream.learner")

HOLD_S = 1.0  # the broker may hold a Take so long; also how late the loop hears that it should stop
PATIENCE_S = 4.0
LONGEST_S = 64.0  # for a piece of the payloads, on a line that is slow
PIECE = 8  # groups fetched at a time: what has come is kept, however long the rest takes
RETRY_S = 0.05
PASSING_REFUSALS = ("not_now", "full")  # an earlier commit is on its way; the broker's disk is full

_CLOSE = b""


class Waiting(NamedTuple):
    """No batch yet; `reason` says who is waited for."""

    reason: str


class Ready(NamedTuple):
    """A batch and what `prepare` made of it."""

    batch: Batch
    work: Any


class _Closed(Exception):  # noqa: N818 - an order, not a defect
    """The training loop has ended."""


class Feed:
    """A thread on every rank; `next` and `close` are called by the training loop of every rank alike.

    Args:
        client: this rank's connection, used by the feed alone.
        first, last: steps to take, `last` excluded.
        wanted: groups whose payload this rank needs.
        prepare: turns a batch and its payloads into what the loop works on; runs in the feed's thread.
    """

    def __init__(
        self,
        client: Client,
        ranks: Ranks,
        first: int,
        last: int,
        wanted: Callable[[Batch], Sequence[GroupId]],
        prepare: Callable[[Batch, Mapping[GroupId, Payload]], Any],
    ) -> None:
        self._client = client
        self._ranks = ranks
        self._wanted, self._prepare = wanted, prepare
        self._items: queue.Queue[Waiting | Ready | Exception] = queue.Queue()
        self._permits = threading.Semaphore(1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first, last), name="feed", daemon=True)
        self._thread.start()

    def next(self) -> Waiting | Ready:
        """The next item; at most a few seconds away.

        Raises:
            RunFailedError: the broker refused a request, or the batch cannot be trained on.
            HistoryLost: the broker stands elsewhere, or has lost a group that it gave.
        """
        item = self._items.get()
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Ready):
            self._permits.release()
        return item

    def close(self) -> None:
        """End the thread, in step with the other ranks."""
        self._closing.set()
        self._permits.release()
        self._thread.join(HOLD_S + 2 * PATIENCE_S)
        if not self._thread.is_alive():
            self._client.close()

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self, first: int, last: int) -> None:
        try:
            for step in range(first, last):
                self._permits.acquire()
                batch = self._take(step)
                payloads = self._fetch(self._wanted(batch))
                self._items.put(Ready(batch, self._prepare(batch, payloads)))
            self._permits.acquire()
        except _Closed:
            return
        except RefusedError as error:
            kind = HistoryLost if error.code == "stale" else RunFailedError
            self._items.put(kind(f"the broker refused the learner: {error}"))
        except Exception as error:  # handed to the training loop, which ends with it
            self._items.put(error)

    def _take(self, step: int) -> Batch:
        while True:
            frame = self._ranks.broadcast(self._ask(step) if self._ranks.leads else None, self._ranks.feed)
            if frame == _CLOSE:
                raise _Closed
            batch, _ = decode(frame)
            assert isinstance(batch, Batch)
            if batch.ready:
                return batch
            self._items.put(Waiting(batch.reason or "the broker"))

    def _ask(self, step: int) -> bytes:
        """Rank 0: one attempt to take `step`, as the frame that all ranks get."""
        if self._closing.is_set():
            return _CLOSE
        try:
            reply = self._client.request(
                Take(step=step, wait_s=HOLD_S), timeout_s=HOLD_S + PATIENCE_S, hold_s=HOLD_S
            )
            batch = reply.message
        except BrokerUnreachable:
            batch = Batch(
                step=step, ready=False, reason=f"no answer from the broker at {self._client.address}"
            )
        except RefusedError as error:
            if error.code not in PASSING_REFUSALS:
                raise
            time.sleep(RETRY_S)
            batch = Batch(step=step, ready=False, reason=str(error))
        return _CLOSE if self._closing.is_set() else encode(batch, 0)

    def _fetch(self, groups: Sequence[GroupId]) -> dict[GroupId, Payload]:
        payloads: dict[GroupId, Payload] = {}
        patience = PATIENCE_S
        while True:
            before = len(payloads)
            self._fetch_more(groups, payloads, patience)
            missing = len(groups) - len(payloads)
            if self._all_have(not missing):
                return payloads
            if missing and len(payloads) == before:
                patience = min(2 * patience, LONGEST_S)
            whose = f"payloads of {missing} groups" if missing else "another rank's payloads"
            self._items.put(Waiting(f"{whose} from the broker at {self._client.address}"))

    def _fetch_more(
        self, groups: Sequence[GroupId], payloads: dict[GroupId, Payload], patience: float
    ) -> None:
        """Add payloads that are missing, piece by piece, for about `patience` seconds."""
        started = time.monotonic()
        missing = [group for group in groups if group not in payloads]
        for first in range(0, len(missing), PIECE):
            piece = missing[first : first + PIECE]
            try:
                reply = self._client.request(Fetch(groups=piece), timeout_s=patience)
            except BrokerUnreachable:
                return
            buffers = reply.payload
            payloads.update((group, buffers[3 * i : 3 * i + 3]) for i, group in enumerate(piece))
            if time.monotonic() - started > patience:
                return

    def _all_have(self, mine: bool) -> bool:
        """Whether every rank has its payloads; rank 0 may close instead."""
        votes = torch.tensor([int(mine), int(not (self._ranks.leads and self._closing.is_set()))])
        if self._ranks.world > 1:
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._ranks.feed)
        if not votes[1]:
            raise _Closed
        return bool(votes[0])
