"""The learner's end: takes snapshots in, gets them to every receiver, and never makes the learner wait.

Invariant: `publish` copies nothing, sends nothing and waits for nobody. At most `max_snapshots` versions are
held; when one more comes, the oldest is given up and whoever was still receiving it gets the newest instead.
A link that fails, freezes or dies costs itself only.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from common.errors import RunFailedError, UserError
from common.weights.disk import DiskSource
from common.weights.dispatch import (
    Action,
    Dispatcher,
    DropLink,
    MakeOffer,
    Push,
    StartSend,
    SteerRelay,
)
from common.weights.errors import Cause, SupersededError
from common.weights.ipc import CudaIpcSource, SharedMemorySource
from common.weights.probe import Probe
from common.weights.protocol import EVENTS, Hop, Offer, decode, edge_name, encode, probe_key
from common.weights.sender import LinkSender, SendReport
from common.weights.snapshot import Snapshot
from common.weights.store import ROUTES, Address, new_token, serve_store
from common.weights.transport import GroupSource, Source

LOGGER = logging.getLogger("slipstream.learner.weights")

BUSY_POLL_S, IDLE_POLL_S = 0.004, 0.02
RETRY_S = 1.0


class Publisher:
    """Offers the learner's weights to all receivers of a run.

    Args:
        bind_host: address to listen on and send from; loopback unless the run spans machines.
        port: of the store; 0 takes a free one.
        run_id: receivers of another run are turned away by it.
        route: "gloo", "nccl", "disk" or "ipc".
        device: where snapshots live ("cpu", or the learner's GPU for "nccl" and GPU "ipc").
        deadline_s: longest single wait for a receiver.
        degree: receivers that the learner, and each relay, serves itself.
        max_snapshots: versions held in memory, the newest included.
        checksum_every: parameters are compared on the first push and every n-th; 0 never.
        folder: shared folder of the "disk" route.

    Raises:
        UserError: a setting is wrong or the address cannot be bound.
    """

    def __init__(
        self,
        bind_host: str = "127.0.0.1",
        port: int = 0,
        *,
        run_id: str,
        route: str = "gloo",
        device: torch.device | str = "cpu",
        deadline_s: float = 30.0,
        degree: int = 4,
        max_snapshots: int = 2,
        checksum_every: int = 50,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_settings(route, torch.device(device), deadline_s, degree, max_snapshots, folder)
        if bind_host in ("", "0.0.0.0", "::"):
            raise UserError(
                f"name the one address that actors reach, not '{bind_host}'", setting="weights.bind"
            )
        self.device = torch.device(device)
        self._max_snapshots = max_snapshots
        self._checksum_every = checksum_every
        token = new_token()
        self._server, bound = serve_store(bind_host, port, run_id)
        self._store = dist.PrefixStore(token, self._server)
        self._store.set("open", "1")
        self._address = Address(route, bind_host, bound, token)
        self._source = _make_source(route, self.device, run_id, token, folder)
        self._dispatcher = Dispatcher(degree, deadline_s, relays=self._source.uses_groups)
        self._lock = threading.Lock()  # guards the dispatcher and the counters below
        self._senders: dict[str, LinkSender] = {}
        self._snapshots: dict[int, Snapshot] = {}  # by push number, oldest first
        self._offers_made: dict[str, int] = {}
        self._push_count = 0
        self._bytes_sent = 0
        self._send_seconds: dict[int, float] = {}
        self._to_prepare: queue.SimpleQueue[tuple[Push, Snapshot] | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[SendReport] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (
                ("weights-prepare", self._prepare_loop),
                ("weights-control", self._control_loop),
            )
        ]
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------- what the learner calls

    @property
    def address(self) -> str:
        """What an actor needs, as one opaque string "route://host:port/token"; hand it over encrypted."""
        return str(self._address)

    def publish(self, version: int, snapshot: Snapshot, probe: Probe | None = None) -> None:
        """Offers `snapshot` as `version` to every receiver, present and future; returns at once.

        A receiver that has committed it may ask for `probe`.

        The publisher owns the snapshot from here on.

        Raises:
            RunFailedError: an actor found that a parameter it had received differs from what was sent.
        """
        self.check()
        snapshot.stamp(version)
        number = self._push_count
        checked = bool(self._checksum_every) and number % self._checksum_every == 0
        digest, size = snapshot.manifest.digest, snapshot.bucket_bytes
        push = Push(number, version, snapshot.nbytes, digest, size, checked)
        self._push_count += 1
        if probe is not None:
            self._store.set(probe_key(number), encode(probe.to_dict()))
        with self._lock:
            self._snapshots[number] = snapshot
            held = [old for old in self._snapshots.values() if not old.released]
        for old in held[: -self._max_snapshots]:
            self._release(old)
        self._to_prepare.put((push, snapshot))

    def make_room(self) -> None:
        """Gives up versions until another may be built beside those that are held; call before taking a snapshot."""
        with self._lock:
            held = [old for old in self._snapshots.values() if not old.released]
        for old in held[: max(0, len(held) - self._max_snapshots + 1)]:
            self._release(old)

    def check(self) -> None:
        """Raises `RunFailedError` when an actor reported a checksum mismatch; names the parameter."""
        if self._dispatcher.fatal:
            raise RunFailedError(f"weight push: {self._dispatcher.fatal}")

    def drop_actor(self, actor_id: str, reason: str = "left the run") -> None:
        """The broker says that an actor is gone: its relay's children are served by others at once."""
        with self._lock:
            self._dispatcher.drop_actor(actor_id, reason)

    def actors(self) -> set[str]:
        """Actors that have a link or meters."""
        with self._lock:
            return {*self._dispatcher.actors, *(link.actor_id for link in self._dispatcher.links.values())}

    def versions_acked(self) -> dict[str, int]:
        """The version that each connected actor has committed."""
        with self._lock:
            links = self._dispatcher.links.values()
            return {link.actor_id: link.version for link in links if link.version is not None}

    def meters(self) -> dict[str, Any]:
        """Counters and gauges; seconds and bytes unless the name says otherwise.

        `versions_behind`, `staged_s` and `stopped_ms` are per actor, `failures` per cause.
        """
        with self._lock:
            dispatcher = self._dispatcher
            newest = dispatcher.latest.version if dispatcher.latest else None
            actors = dispatcher.actors
            last_push = max(self._send_seconds, default=None)
            return {
                "version": newest,
                "pushes": self._push_count,
                "links": len(dispatcher.links),
                "snapshots_held": len(self._snapshots),
                "bytes_sent": self._bytes_sent,
                "bytes_relayed": dispatcher.bytes_relayed,
                "send_s": self._send_seconds[last_push] if last_push is not None else 0.0,
                "staged_s": {actor: m.staged_s for actor, m in actors.items()},
                "stopped_ms": {actor: m.stopped_ms for actor, m in actors.items()},
                "versions_behind": {
                    actor: newest - m.version
                    for actor, m in actors.items()
                    if newest is not None and m.version is not None
                },
                "failures": {str(cause): count for cause, count in dispatcher.failures.items()},
            }

    def close(self) -> None:
        """Stops offering; receivers are told, and keep generating with what they have."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._to_prepare.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)
        self._store.delete_key("open")
        for name in self._dispatcher.links:
            self._store.set(f"{name}/dropped", encode("the learner stopped serving weights"))
        for sender in self._senders.values():
            sender.close()
        self._source.close()

    # ---------------------------------------------------------------- preparing thread

    def _prepare_loop(self) -> None:
        """Checksums and files are made here: they cost a pass over the weights, which is not the learner's.

        What cannot be prepared (a full disk, a store that went away) is tried again until a newer version comes:
        it may be the last, and training goes on meanwhile.
        """
        failed: tuple[Push, Snapshot] | None = None
        while True:
            try:
                job = self._to_prepare.get(timeout=None if failed is None else RETRY_S)
            except queue.Empty:
                job = failed
            if job is None:
                return
            done = self._offered(*job, again=job is failed)
            failed = None if done else job

    def _offered(self, push: Push, snapshot: Snapshot, *, again: bool) -> bool:
        """Prepare and offer a version; False where that may succeed later."""
        try:
            self._prepare(push, snapshot)
        except SupersededError:
            return True
        except Exception as error:
            if not again:
                LOGGER.error("weights: version %d cannot be offered yet: %s", push.version, error)
                with self._lock:
                    self._dispatcher.failures[Cause.UNWRITTEN] += 1
            return False
        if again:
            LOGGER.info("weights: version %d can be offered now", push.version)
        with self._lock:
            self._dispatcher.publish(push)
        return True

    def _prepare(self, push: Push, snapshot: Snapshot) -> None:
        self._store.set(f"manifest/{snapshot.manifest.digest}", snapshot.manifest.to_json())
        if push.checksums:
            self._store.set(f"checksums/{push.number}", encode(snapshot.add_checksums()))
        self._source.prepare(snapshot)

    def _release(self, snapshot: Snapshot) -> None:
        snapshot.release()
        if snapshot.version is not None:
            self._source.retire(snapshot.version)

    # ---------------------------------------------------------------- control thread

    def _control_loop(self) -> None:
        while not self._closed.wait(BUSY_POLL_S if self._dispatcher.busy else IDLE_POLL_S):
            try:
                self._control_step()
            except Exception:  # one bad message must not end all pushes; it is logged with its stack
                LOGGER.exception("weights: control step failed")

    def _control_step(self) -> None:
        now = time.monotonic()
        with self._lock:
            while self._store.queue_len(EVENTS) > 0:
                self._dispatcher.event(decode(self._store.queue_pop(EVENTS, block=False)), now)
            self._take_reports()
            for action in self._dispatcher.actions(now):
                self._perform(action)
            done = {n: self._snapshots.pop(n) for n in sorted(self._snapshots.keys() - self._needed())}
        for number, snapshot in done.items():
            self._release(snapshot)
            self._store.delete_key(f"checksums/{number}")
            self._store.delete_key(probe_key(number))

    def _needed(self) -> set[int]:
        """Pushes still to be sent from here, the newest, and those that are being prepared."""
        latest = self._dispatcher.latest
        unprepared = {n for n in self._snapshots if latest is None or n > latest.number}
        return self._dispatcher.pushes_in_use() | unprepared

    def _take_reports(self) -> None:
        while not self._reports.empty():
            report = self._reports.get()
            if report.error is None:
                self._bytes_sent += report.nbytes
                newest = max(report.push, *self._send_seconds, -1)
                self._send_seconds[report.push] = self._send_seconds.get(report.push, 0.0) + report.seconds
                self._send_seconds = {newest: self._send_seconds[newest]}
            elif not isinstance(report.error, SupersededError):
                self._senders.pop(report.link, None)
                self._dispatcher.drop(report.link, report.error.cause, str(report.error))

    def _perform(self, action: Action) -> None:
        if isinstance(action, MakeOffer | StartSend) and action.link not in self._dispatcher.links:
            return  # dropped by a later event of the same batch
        match action:
            case MakeOffer():
                self._make_offer(action)
            case StartSend(link=name, push=number):
                self._sender(name).send(number, self._snapshots[number])
            case SteerRelay(parent=parent, child=child, push=number, go=go):
                self._store.set(f"{edge_name(parent, child)}/go/{number}", encode(go))
            case DropLink(link=name, reason=reason):
                LOGGER.warning("weights: link %s closed: %s", name, reason)
                self._store.set(f"{name}/dropped", encode(reason))
                self._offers_made.pop(name, None)
                if (sender := self._senders.pop(name, None)) is not None:
                    sender.close()

    def _make_offer(self, action: MakeOffer) -> None:
        link, push = self._dispatcher.links[action.link], self._dispatcher.pushes[action.push]
        snapshot = self._snapshots[action.push]
        try:
            ticket = self._source.ticket(snapshot, link.workers) if action.parent is None else {}
        except SupersededError:
            self._dispatcher.withdraw(link.name)
            return
        hop = Hop(edge_name(action.parent, link.name), link.workers) if self._source.uses_groups else None
        offer = Offer(
            push=push.number,
            version=push.version,
            manifest=push.manifest,
            bucket_bytes=push.bucket_bytes,
            nbytes=push.nbytes,
            ticket=ticket,
            hop=hop,
            relays=tuple(self._relays(action)),
            checksums=push.checksums,
            deadline_s=self._dispatcher.deadline_s,
        )
        count = self._offers_made.get(link.name, 0)
        self._offers_made[link.name] = count + 1
        self._store.set(f"{link.name}/offer/{count}", encode(offer.to_dict()))

    def _relays(self, action: MakeOffer) -> Iterator[Hop]:
        for name in action.children:
            if (child := self._dispatcher.links.get(name)) is not None:
                yield Hop(edge_name(action.link, name), child.workers)

    def _sender(self, name: str) -> LinkSender:
        if name not in self._senders:
            workers = self._dispatcher.links[name].workers
            self._senders[name] = LinkSender(
                self._address, name, workers, self.device, self._dispatcher.deadline_s, self._reports.put
            )
        return self._senders[name]


def _check_settings(
    route: str,
    device: torch.device,
    deadline_s: float,
    degree: int,
    max_snapshots: int,
    folder: str | os.PathLike[str] | None,
) -> None:
    if route not in ROUTES:
        raise UserError(f"'{route}' is not one of {', '.join(ROUTES)}", setting="weights.route")
    if route == "nccl" and device.type != "cuda":
        raise UserError("nccl needs the learner on a GPU", setting="weights.route")
    if route == "gloo" and device.type != "cpu":
        raise UserError("gloo sends from host memory: take snapshots on the CPU", setting="weights.route")
    if route == "disk" and folder is None:
        raise ValueError("the disk route needs a folder that actors share")
    if max_snapshots < 1:
        raise ValueError(f"max_snapshots must be positive, not {max_snapshots}")
    for name, value in (("deadline_s", deadline_s), ("degree", degree)):
        if value < (0.001 if name == "deadline_s" else 1):
            raise UserError(f"must be positive, not {value}", setting=f"weights.{name}")


def _make_source(
    route: str, device: torch.device, run_id: str, token: str, folder: str | os.PathLike[str] | None
) -> Source:
    match route:
        case "disk":
            assert folder is not None
            return DiskSource(folder, run_id, token)
        case "ipc":
            return CudaIpcSource() if device.type == "cuda" else SharedMemorySource(token)
        case _:
            return GroupSource()
