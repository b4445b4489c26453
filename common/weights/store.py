"""The rendezvous store of a run, with a deadline on every operation.

Invariant: no call here waits longer than its deadline, whatever the learner's process does. A TCPStore client
has no deadline of its own against a frozen server (its `check`, `get` and `wait` were seen to block until the
server went on), so every client lives in a thread of its own that is abandoned when a deadline passes.

The store is not authenticated. What protects it is the address that actors get over the broker's encrypted
channel: a random token prefixes every key, and the server listens on loopback unless told otherwise.
"""

from __future__ import annotations

import datetime
import json
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from common.errors import UserError
from common.weights.errors import Cause, LinkError

T = TypeVar("T")

ROUTES = ("gloo", "nccl", "disk", "ipc")
OPERATION_DEADLINE_S = 10.0
POLL_S = 0.01
_RUN_KEY = "slipstream/run"


@dataclass(frozen=True)
class Address:
    """Where a run's weights are offered, as one string: "route://host:port/token"."""

    route: str
    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{self.route}://{self.host}:{self.port}/{self.token}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises `UserError` for anything that is not the `str` of an address."""
        parts = urlsplit(text)
        try:
            valid = parts.scheme in ROUTES and parts.hostname and parts.port and len(parts.path) > 1
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"'{text}' is not a weight address such as gloo://127.0.0.1:29500/<token>")
        return cls(parts.scheme, str(parts.hostname), int(parts.port or 0), parts.path[1:])


def new_token() -> str:
    return secrets.token_hex(16)


def serve_store(host: str, port: int, run_id: str) -> tuple[dist.TCPStore, int]:
    """Starts a store that listens on `host` only (TCPStore by itself would listen on every interface).

    Returns the store and its port (`port` = 0 takes a free one).

    Raises:
        UserError: the address cannot be bound.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}", setting="weights.bind"
        ) from error
    listener.listen(128)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, None, True, _seconds(OPERATION_DEADLINE_S),
        wait_for_workers=False, master_listen_fd=listener.detach(),
    )  # fmt: skip
    store.set(_RUN_KEY, run_id)
    return store, port


def connect(address: Address, timeout: float) -> dist.TCPStore:
    """A client whose own time-outs are `timeout` seconds; blocks its thread without limit on a frozen server."""
    return dist.TCPStore(address.host, address.port, None, False, _seconds(timeout), wait_for_workers=False)


class StoreClient:
    """JSON values under the run's token, each operation in this client's own thread with a deadline.

    Args:
        address: of the publisher.
        run_id: the run that the store must belong to.

    Raises:
        LinkError: cause STORE when nothing answers, FOREIGN_RUN when another run or learner does.
    """

    def __init__(self, address: Address, run_id: str, *, deadline_s: float = OPERATION_DEADLINE_S) -> None:
        self.address = address
        self._deadline_s = deadline_s
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._interrupted = threading.Event()
        threading.Thread(target=self._loop, name="weights-store", daemon=True).start()
        self.store: dist.Store  # for work in the client's own thread only
        try:
            self.wait(self.submit(lambda: self._open(run_id)), deadline_s)
        except LinkError:
            self.close()
            raise

    def _open(self, run_id: str) -> None:
        store = connect(self.address, self._deadline_s)
        where = f"{self.address.host}:{self.address.port}"
        if not store.check([_RUN_KEY]):
            raise LinkError(Cause.FOREIGN_RUN, f"the store on {where} is not a Slipstream weight store")
        owner = store.get(_RUN_KEY).decode()
        if owner != run_id:
            raise LinkError(
                Cause.FOREIGN_RUN, f"the store on {where} belongs to run {owner}, not to {run_id}"
            )
        prefixed = dist.PrefixStore(self.address.token, store)
        if not prefixed.check(["open"]):
            raise LinkError(
                Cause.FOREIGN_RUN,
                f"run {run_id} on {where} has another token: its learner stopped or restarted",
            )
        self.store = prefixed

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            if self._closed.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(work())
            except LinkError as error:
                future.set_exception(error)
            except Exception as error:
                future.set_exception(LinkError(Cause.STORE, f"weight store: {_first_line(error)}"))

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` in the client's thread, after whatever was submitted before."""
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return future

    def wait(self, future: Future[T], timeout: float) -> T:
        """Result of `future` within `timeout` seconds; on failure the client is of no further use."""
        try:
            return future.result(timeout)
        except TimeoutError:
            self.close()
            raise LinkError(Cause.STORE, f"the weight store did not answer within {timeout:g} s") from None

    def _call(self, work: Callable[[], T], deadline_s: float | None = None) -> T:
        if self._closed.is_set():
            raise LinkError(Cause.STORE, "the connection to the weight store is closed")
        return self.wait(self.submit(work), self._deadline_s if deadline_s is None else deadline_s)

    def push(self, key: str, value: object, deadline_s: float | None = None) -> None:
        """Appends to a queue that the publisher reads; atomic, so a sender killed here leaves no hole."""
        self._call(lambda: self.store.queue_push(key, json.dumps(value)), deadline_s)

    def text(self, key: str) -> str:
        """The value of `key` as it was written."""
        return self._call(lambda: self.store.get(key).decode())

    def text_if_set(self, key: str) -> str | None:
        """The same, or None where nothing is written."""

        def read() -> str | None:
            return self.store.get(key).decode() if self.store.check([key]) else None

        return self._call(read)

    def pause(self, seconds: float) -> None:
        """For polling loops in the client's thread: sleeps, and raises LEFT after `interrupt`."""
        if self._interrupted.wait(seconds):
            raise LinkError(Cause.LEFT, "closed")

    def interrupt(self) -> None:
        """Ends a polling loop under way, so that the client is free for a last message."""
        self._interrupted.set()

    def close(self) -> None:
        """Ends the client's thread as soon as it is free; never blocks."""
        self._closed.set()
        self._interrupted.set()
        self._jobs.put(None)


def _seconds(value: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
