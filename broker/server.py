"""The broker's loop: one thread, one ROUTER socket.

Invariant: nothing that arrives can stop the loop; a reply that confirms something leaves only after the store
has saved it (group commit: one save for all messages of a round); memory is bounded by finite high-water marks,
a largest message, and an intake that stops when the disk is full.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import zmq

from broker.metrics_page import MetricsPage
from broker.outbox import Outgoing
from broker.service import Service
from broker.store import Buffer, StoreFull
from common.process import StopSignal
from common.systemd import Watchdog

log = logging.getLogger("slipstream.broker")

HIGH_WATER_MARK = 64
ROUND_MESSAGES = 64  # more would keep the learner waiting behind the actors
ROUND_BYTES = 32 << 20
IDLE_MS = 20
TICK_S = 0.25
RETRY_FULL_S = 1.0
LAST, MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
ZERO_COPY_BYTES = 65536  # below it a copy costs less than the book-keeping that saves it


def open_socket(context: zmq.Context, max_message_mb: int) -> Any:
    """A ROUTER with finite queues that drops what no longer has a receiver."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_mb << 20)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.BACKLOG, 4096)
    return socket


class Server:
    """Carries messages between the socket and the service until the run has ended.

    Args:
        socket: bound ROUTER.
        service: answers.
        stop: set by a signal: end at once, in order; peers wait for a restart.
        page: the metrics page, or None.
    """

    def __init__(
        self,
        socket: Any,
        service: Service,
        stop: threading.Event | StopSignal,
        page: MetricsPage | None = None,
    ) -> None:
        self._socket, self._service, self._stop, self._page = socket, service, stop, page
        self._watchdog = Watchdog()
        self._next_tick = 0.0
        self._next_save = 0.0

    def run(self) -> str:
        """Serve until the run has ended or `stop` is set; returns why."""
        service = self._service
        while not self._stop.is_set():
            now = time.monotonic()
            if not self._receive(now):  # a look costs less than a poll: under load there is always something
                self._socket.poll(IDLE_MS)
                now = time.monotonic()
                self._receive(now)
            if now >= self._next_tick:
                self._tick(now)
            service.settle(now)
            self._deliver(now)
            if service.ending.over(now):
                return service.ending.reason or "finished"
        return "interrupted"

    def _receive(self, now: float) -> int:
        """Take in what has arrived, up to a round's share; returns its bytes."""
        size = 0
        for _ in range(ROUND_MESSAGES):
            frames = self._next_message()
            if frames is None:
                break
            size += sum(len(frame) for frame in frames)
            self._service.receive(bytes(frames[0]), frames[1:], now)
            if size > ROUND_BYTES:
                break
        return size

    def _next_message(self) -> list[Buffer] | None:
        """What `recv_multipart` does, without a socket option asked for after each frame."""
        receive = self._socket.recv
        try:
            frames = [receive(LAST, copy=False)]
        except zmq.Again:
            return None
        while frames[-1].more:
            frames.append(receive(LAST, copy=False))
        return frames

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        self._watchdog.beat()
        self._service.tick(now)
        if self._page is not None:
            self._page.update(self._service, now)

    def _deliver(self, now: float) -> None:
        self._save(now)
        replies = self._service.outbox.empty(full=self._service.state.disk_full)
        for reply in replies:
            self._send(reply)
        if replies and self._page is not None:
            self._page.ack_seconds.observe(time.monotonic() - now)

    def _save(self, now: float) -> None:
        state = self._service.state
        if state.disk_full and now < self._next_save:
            return
        try:
            state.save()
        except StoreFull as error:
            self._next_save = now + RETRY_FULL_S
            if state.disk_full is None:
                log.error("intake stops: %s", error)
                state.disk_full = f"the broker's disk is full, nothing is taken in: {error}"
                state.event(state.disk_full, warning=True)
            return
        if state.disk_full is not None:
            state.disk_full = None
            state.event("the disk has space again: intake goes on")
            log.warning("the disk has space again: intake goes on")

    def _send(self, reply: Outgoing) -> None:
        send = self._socket.send
        try:
            send(reply.origin.connection, MORE)
            for part in reply.frames[:-1]:
                send(part, MORE, copy=_copied(part))
            send(reply.frames[-1], LAST, copy=_copied(reply.frames[-1]))
        except zmq.ZMQError as error:  # gone, or not reading: it will ask again
            log.debug("a reply was dropped: %s", error)


def _copied(part: Buffer) -> bool:
    return not isinstance(part, zmq.Frame) and len(part) < ZERO_COPY_BYTES
