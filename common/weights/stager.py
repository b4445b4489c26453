"""The receiving end in each worker: collects a version in the background and keeps it until it is committed.

Invariant: only a complete, footer- and checksum-checked version can be taken for commit; a failure on the way
leaves nothing behind. All waiting is done in threads of this object; no method here blocks its caller.

The engine's worker extension and the scripted receivers of the tests and benchmarks use this same class.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from common.weights.checksum import checksum
from common.weights.disk import fetch_from_disk
from common.weights.errors import Cause, LinkError
from common.weights.group import Group, local_address_towards, use_own_stream
from common.weights.ipc import fetch_shared
from common.weights.layout import Bucket, Manifest, plan_buckets
from common.weights.protocol import EVENTS, Hop, LinkSpec, Offer, decode, encode
from common.weights.store import POLL_S, Address, connect
from common.weights.transport import BufferPool, receive_buckets, send_buckets


class Staged:
    """A complete version in this worker's memory. Its buffers return to the pool with the last `release`.

    `prepared` is whatever the stager's `prepare` made of it in the background.
    """

    def __init__(
        self,
        offer: Offer,
        manifest: Manifest,
        layout: list[Bucket],
        buffers: list[torch.Tensor],
        pool: BufferPool,
    ) -> None:
        self.version = offer.version
        self.manifest = manifest
        self.layout = layout
        self.buffers = buffers
        self.prepared: Any = None
        self._pool = pool
        self._holders = 1 + len(offer.relays)
        self._lock = threading.Lock()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter by name, as a view that is valid until `release`."""
        for bucket, buffer in zip(self.layout, self.buffers, strict=True):
            for slot in bucket.slots:
                yield slot.spec.name, slot.view(buffer)

    def release(self) -> None:
        """One holder (the commit, or one relay) is done with the copy."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        self._pool.give_back(self.buffers)
        self.buffers = []


class Stager:
    """Receives versions for one worker of a link.

    Args:
        spec: the link.
        rank: this worker's rank among the `spec.workers` of the link, 0-based. Rank 0 also relays.
        device: where to stage ("cpu" stages in host memory whatever the engine runs on).
        prepare: called in the background with every complete version, to make its commit cheap.
    """

    def __init__(
        self,
        spec: LinkSpec,
        rank: int,
        device: torch.device | str = "cpu",
        prepare: Callable[[Staged], Any] | None = None,
    ) -> None:
        self.spec = spec
        self.rank = rank
        self._address = Address.parse(spec.address)
        self._device = torch.device(device)
        self._prepare = prepare
        self._pool = BufferPool(self._device)
        self._offers: queue.SimpleQueue[Offer | None] = queue.SimpleQueue()
        self._groups: dict[str, Group] = {}
        self._streams: dict[str, torch.cuda.Stream | None] = {}  # of this link and of each relay's edge
        self._staged: Staged | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="weights-stage", daemon=True).start()

    def stage(self, offer: Mapping[str, Any] | Offer) -> None:
        """Starts to receive a version; its outcome appears in the store for the link's driver."""
        self._offers.put(offer if isinstance(offer, Offer) else Offer.from_dict(offer))

    def take(self, version: int) -> Staged:
        """The staged copy of `version`, which the caller releases when it is committed.

        Raises:
            LinkError: nothing complete of that version is here.
        """
        with self._lock:
            staged, self._staged = self._staged, None
        if staged is None or staged.version != version:
            raise LinkError(Cause.TRUNCATED, f"version {version} is not staged here")
        return staged

    def close(self) -> None:
        """Gives up whatever is under way; threads stuck in a transfer end at their own deadline."""
        self._closed.set()
        self._offers.put(None)
        with self._lock:
            groups, self._groups = list(self._groups.values()), {}
            self._staged = None
        for group in groups:
            group.close()

    # ---------------------------------------------------------------- receiving thread

    def _run(self) -> None:
        store: dist.Store | None = None
        self._use_own_stream(self.spec.link)
        while (offer := self._offers.get()) is not None and not self._closed.is_set():
            staged = None
            report: dict[str, Any] = {"ok": False}
            try:
                started = time.monotonic()
                store = store or self._connect()
                staged = self._receive(store, offer)
                report = {"ok": True, "seconds": time.monotonic() - started}
            except LinkError as error:
                report |= {"cause": error.cause, "reason": str(error)}
            except Exception as error:  # must reach the driver, not end the thread in silence
                report |= {"cause": Cause.PEER_LOST, "reason": f"{type(error).__name__}: {error}"[:300]}
            if self._closed.is_set():
                return
            if staged is not None:
                self._keep(staged, offer)
            with contextlib.suppress(RuntimeError):
                if store is not None:  # else the driver's deadline tells
                    store.set(f"{self.spec.link}/staged/{offer.push}/{self.rank}", encode(report))

    def _keep(self, staged: Staged, offer: Offer) -> None:
        with self._lock:
            self._staged, stale = staged, self._staged
        if stale is not None:
            stale.release()
        if self.rank == 0:
            for hop in offer.relays:
                relay = partial(self._relay, staged, offer, hop)
                threading.Thread(target=relay, name="weights-relay", daemon=True).start()
        else:
            for _ in offer.relays:
                staged.release()

    def _connect(self) -> dist.Store:
        """A connection for the calling thread; against a frozen learner the driver's deadline applies."""
        try:
            return dist.PrefixStore(self._address.token, connect(self._address, self.spec.deadline_s))
        except dist.DistError as error:
            raise LinkError(Cause.STORE, f"weight store: {str(error).splitlines()[0][:200]}") from None

    def _receive(self, store: dist.Store, offer: Offer) -> Staged:
        manifest = Manifest.from_json(store.get(f"manifest/{offer.manifest}").decode())
        layout = plan_buckets(manifest, offer.bucket_bytes)
        buffers = self._fetch(store, offer, layout)
        staged = Staged(offer, manifest, layout, buffers, self._pool)
        if offer.checksums:
            verify(staged, decode(store.get(f"checksums/{offer.push}")))
        if self._prepare is not None:
            staged.prepared = self._prepare(staged)
        return staged

    def _fetch(self, store: dist.Store, offer: Offer, layout: list[Bucket]) -> list[torch.Tensor]:
        timeout = offer.deadline_s
        if offer.hop is not None:
            group = self._group(store, offer.hop, 1 + self.rank, timeout)
            return receive_buckets(group, layout, offer.version, self._pool, timeout)
        if self._address.route == "disk":
            return fetch_from_disk(dict(offer.ticket), layout, offer.version, self._pool, timeout)
        return fetch_shared(dict(offer.ticket), layout, offer.version, self._pool, self.rank)

    def _group(self, store: dist.Store, hop: Hop, rank: int, timeout: float) -> Group:
        """The edge's group, opened at its first use and kept for the next push."""
        with self._lock:
            group = self._groups.get(hop.edge)
        if group is None:
            host = local_address_towards(self._address.host, self._address.port)
            group = Group(store, hop.edge, rank, 1 + hop.workers, self._device, timeout, host)
            with self._lock:
                self._groups[hop.edge] = group
        return group

    def _use_own_stream(self, name: str) -> None:
        """On a GPU the calling thread works on the staging device and on the stream of `name`, the same at each push."""
        with self._lock:
            self._streams[name] = use_own_stream(self._device, self._streams.get(name))

    # ---------------------------------------------------------------- relay threads

    def _relay(self, staged: Staged, offer: Offer, hop: Hop) -> None:
        """Passes a complete version on to one child; a failure here costs the child's link only."""
        event: dict[str, Any] = {"link": self.spec.link, "edge": hop.edge, "push": offer.push}
        started = time.monotonic()
        try:
            self._use_own_stream(hop.edge)
            store = self._connect()
            if not self._await_go(store, hop, offer):
                return
            group = self._group(store, hop, 0, offer.deadline_s)
            send_buckets(group, staged.layout, staged.buffers.__getitem__, offer.version, offer.deadline_s)
            event |= {"event": "relayed", "seconds": time.monotonic() - started}
            store.queue_push(EVENTS, encode(event))
        except (LinkError, RuntimeError) as error:
            with self._lock:
                broken = self._groups.pop(hop.edge, None)
            if broken is not None:
                broken.close()
            with contextlib.suppress(RuntimeError, UnboundLocalError):
                store.queue_push(
                    EVENTS, encode(event | {"event": "relay_failed", "reason": str(error)[:200]})
                )
        finally:
            staged.release()

    def _await_go(self, store: dist.Store, hop: Hop, offer: Offer) -> bool:
        """Waits until the learner has offered the version to the child; False when it took another way."""
        end = time.monotonic() + offer.push_deadline_s
        key = f"{hop.edge}/go/{offer.push}"
        while not store.check([key]):
            if time.monotonic() > end or self._closed.wait(POLL_S):
                return False
        go = bool(decode(store.get(key)))
        store.delete_key(key)
        return go


def verify(staged: Staged, expected: Mapping[str, str]) -> None:
    """Raises `LinkError` (CHECKSUM) that names the first parameter whose bytes differ from the learner's."""
    for name, tensor in staged.tensors():
        if checksum(tensor) != expected.get(name):
            raise LinkError(
                Cause.CHECKSUM,
                f"parameter {name} of version {staged.version} differs from what the learner sent",
            )
