"""The peer's side of the wire: a DEALER connection to the broker that asks until it is answered.

Invariant: a request is answered exactly once to its caller, or the caller gets an error that says why; no wait
is without a deadline unless the caller asks for that, and then it says every few seconds whom it waits for.
Requests are idempotent, so a lost reply, a restarted broker or a reconnect are all cured the same way: say
Hello again if the broker does not know us, and send the same request once more, under the same number.

A broker that comes back elsewhere (a requeued job, another free port) is followed: where a peer was given the
file in which the broker announces itself, it looks there again whenever no answer comes.

Frames: [header, *payload]; the header is `common.codec.encode`. Sockets have finite high-water marks and
LINGER 0, so that a process can always leave.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from typing import Any, Literal, NamedTuple

import zmq
import zmq.asyncio
from msgspec.structs import replace

from common import keys as curve
from common.codec import MAX_HEADER_BYTES, decode, encode
from common.errors import SlipstreamError, UserError
from common.messages import Hello, MalformedMessage, Message, Refused, Welcome
from common.software import software_version

log = logging.getLogger("slipstream.wire")

HIGH_WATER_MARK = 1000
ATTEMPT_S = 5.0
NOTICE_S = 10.0
ANNOUNCED = "file:"
PROCESS = secrets.token_hex(8)
PREDECESSOR_S, PREDECESSOR_RETRY_S = 60.0, 0.25  # how long a process of our name may take to be gone

Buffers = Sequence[bytes | memoryview]


class Reply(NamedTuple):
    """An answer: the message and its payload buffers (zero-copy views of the frames)."""

    message: Message
    payload: list[memoryview]


class RefusedError(SlipstreamError):
    """The broker refused a request; `code` and `passes_s` are for programs (see `messages.Refused`), the text for people."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.code, self.passes_s = refused.code, refused.passes_s


class BrokerUnreachable(SlipstreamError):  # noqa: N818 - a state of the world, not a defect
    """No answer from the broker within the caller's deadline."""


def from_file(path: Path) -> str:
    """The address of a broker that announces itself in a file ({"address": "host:port"}), for `Client`."""
    return f"{ANNOUNCED}{path.resolve()}"


def _endpoint(address: str) -> str | None:
    """The ZeroMQ endpoint of an address now; None while the file of a broker names none."""
    if address.startswith(ANNOUNCED):
        try:
            path = Path(address.removeprefix(ANNOUNCED))
            address = str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return address if "://" in address else f"tcp://{address}"


def _follow(socket: Any, address: str, connected: str | None) -> str | None:
    """Connect to where the broker is now; returns the endpoint that the socket is connected to."""
    endpoint = _endpoint(address)
    if endpoint is None or endpoint == connected:
        return connected
    if connected is not None:
        log.warning("the broker has moved from %s to %s", connected, endpoint)
        socket.disconnect(connected)
    socket.connect(endpoint)
    return endpoint


def _open_socket(context: zmq.Context, address: str, keys: Path | None) -> tuple[Any, str | None]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    # a broker that comes back is not greeted by what was asked while it was away
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    try:
        if keys is not None:
            curve.apply_client(socket, keys)
        return socket, _follow(socket, address, None)
    except zmq.ZMQError as error:
        socket.close()
        raise UserError(f"cannot connect to '{address}': {error}.", setting="--join") from None


def _read(frames: list[zmq.Frame]) -> tuple[Message, int, list[memoryview]] | None:
    try:
        message, request = decode(frames[0].buffer)
    except MalformedMessage as error:
        log.warning("ignored a malformed reply: %s", error)
        return None
    return message, request, [frame.buffer for frame in frames[1:]]


def _attempt_seconds(started: float, timeout_s: float | None, hold_s: float) -> float:
    attempt = ATTEMPT_S + hold_s
    if timeout_s is None:
        return attempt
    return max(0.0, min(attempt, started + timeout_s - time.monotonic()))


def _still_waiting(
    address: str, message: Message, started: float, timeout_s: float | None, notice: float
) -> float:
    """Raise when the caller's time is up; else say now and then who is waited for, and when to say it next."""
    waited = time.monotonic() - started
    if timeout_s is not None and waited >= timeout_s:
        advice = ": is it running there, is the port open, and are the keys the broker's?"
        raise BrokerUnreachable(
            f"no answer from the broker at {address} for {waited:.0f} s ({message.kind})"
            f"{advice if isinstance(message, Hello) else ''}"
        )
    if time.monotonic() < notice:
        return notice
    log.warning("waiting for the broker at %s for %.0f s (%s)", address, waited, message.kind)
    return time.monotonic() + NOTICE_S


def hello(role: Literal["actor", "learner", "observer"], peer: str, **more: Any) -> Hello:
    """Who we are: this installation, host and process. `more` are further fields of `Hello`, or others for these."""
    ours = {"software": software_version(), "host": gethostname(), "pid": os.getpid()}
    return Hello(role=role, peer=peer, **{**ours, **more})


def _header(message: Message, number: int) -> bytes:
    """The header frame of a request. Raises RefusedError: the broker would not take it, or never see it."""
    frame = encode(message, number)
    if len(frame) > MAX_HEADER_BYTES:
        size = f"{len(frame)} bytes; at most {MAX_HEADER_BYTES} are accepted"
        raise RefusedError(
            Refused(code="malformed", reason=f"the {message.kind} was not sent: it has {size}")
        )
    return frame


def _identified(hello: Hello) -> Hello:
    return hello if hello.process else replace(hello, process=PROCESS)


def _refused(message: Message, refused: Refused, started: float, timeout_s: float | None) -> None:
    """Raise the refusal, unless it passes: an earlier process of our name is not known to be gone yet."""
    waited = time.monotonic() - started
    patience = PREDECESSOR_S if timeout_s is None else min(PREDECESSOR_S, timeout_s)
    if (
        not isinstance(message, Hello)
        or refused.code != "not_now"
        or waited + 2 * PREDECESSOR_RETRY_S > patience
    ):
        raise RefusedError(refused)
    if waited < PREDECESSOR_RETRY_S:
        log.warning("%s; trying for %.0f s", refused.reason, patience)


class Client:
    """A blocking connection, for one request at a time; callers of several threads take turns.

    Args:
        address: "host:port" or "tcp://host:port" of the broker, or `from_file(path)` to follow it.
        hello: who we are; sent first, and again whenever the broker does not know us.
        keys: folder of CURVE keys, or None on loopback without keys.
    """

    def __init__(self, address: str, hello: Hello, *, keys: Path | None = None) -> None:
        self.address = address
        self.hello = _identified(hello)
        self._socket, self._connected = _open_socket(zmq.Context.instance(), address, keys)
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()

    def connect(self, timeout_s: float | None = 30.0) -> Welcome:
        """Say Hello; returns the broker's Welcome.

        Raises:
            RefusedError: the broker will not have us (another run, version or tokenizer).
            BrokerUnreachable: no answer in time; None waits for ever and says so.
        """
        reply = self.request(self.hello, timeout_s=timeout_s)
        assert isinstance(reply.message, Welcome)
        return reply.message

    def request(
        self, message: Message, payload: Buffers = (), *, timeout_s: float | None = 60.0, hold_s: float = 0.0
    ) -> Reply:
        """Send a request and return its reply, sending again while no answer comes.

        Args:
            message: the request.
            payload: raw buffers that follow the header.
            timeout_s: seconds until `BrokerUnreachable`; None waits for ever.
            hold_s: seconds that the broker may hold this request before it answers (long poll).

        Raises:
            RefusedError: the broker refused it, or it is too large. BrokerUnreachable: no answer in time.
        """
        with self._turn:
            return self._request(message, payload, timeout_s, hold_s)

    def _request(self, message: Message, payload: Buffers, timeout_s: float | None, hold_s: float) -> Reply:
        started = time.monotonic()
        notice = started + NOTICE_S + hold_s
        number = next(self._numbers)  # the same at every attempt: a late answer is an answer
        header = _header(message, number)
        while True:
            deadline = time.monotonic() + _attempt_seconds(started, timeout_s, hold_s)
            self._send([header, *payload], deadline)
            reply = self._await(number, deadline)
            if reply is None:
                notice = _still_waiting(self._connected or self.address, message, started, timeout_s, notice)
                self._connected = _follow(self._socket, self.address, self._connected)
            elif isinstance(reply.message, Refused):
                if reply.message.code == "unknown_peer" and not isinstance(message, Hello):
                    self._request(self.hello, (), timeout_s, 0.0)
                else:
                    _refused(message, reply.message, started, timeout_s)
                    time.sleep(PREDECESSOR_RETRY_S)
            else:
                return reply

    def _send(self, frames: list[Any], deadline: float) -> None:
        """Send once there is a connection; if there is none until `deadline`, the next attempt sends."""
        left = max(0.0, deadline - time.monotonic())
        if self._socket.poll(int(left * 1000) + 1, zmq.POLLOUT):
            with suppress(zmq.Again):
                self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)

    def _await(self, number: int, deadline: float) -> Reply | None:
        while (left := deadline - time.monotonic()) > 0:
            if not self._socket.poll(int(left * 1000) + 1):
                return None
            read = _read(self._socket.recv_multipart(copy=False))
            if read is not None and read[1] == number:
                return Reply(read[0], read[2])
        return None

    def close(self) -> None:
        """Close the socket at once; nothing is flushed."""
        self._socket.close()


class AsyncClient:
    """The same for asyncio, with any number of requests in flight."""

    def __init__(self, address: str, hello: Hello, *, keys: Path | None = None) -> None:
        self.address = address
        self.hello = _identified(hello)
        self._socket, self._connected = _open_socket(zmq.asyncio.Context.instance(), address, keys)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._introduction = asyncio.Lock()

    async def connect(self, timeout_s: float | None = 30.0) -> Welcome:
        """Say Hello; see `Client.connect`."""
        reply = await self.request(self.hello, timeout_s=timeout_s)
        assert isinstance(reply.message, Welcome)
        return reply.message

    async def request(
        self, message: Message, payload: Buffers = (), *, timeout_s: float | None = 60.0, hold_s: float = 0.0
    ) -> Reply:
        """Send a request and return its reply; see `Client.request`."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_replies(), name="wire-reader")
        started = time.monotonic()
        notice = started + NOTICE_S + hold_s
        number = next(self._numbers)  # the same at every attempt: a late answer is an answer
        frames = [_header(message, number), *payload]
        while True:
            attempt_s = _attempt_seconds(started, timeout_s, hold_s)
            reply = await self._attempt(frames, number, attempt_s)
            if reply is None:
                notice = _still_waiting(self._connected or self.address, message, started, timeout_s, notice)
                self._connected = _follow(self._socket, self.address, self._connected)
            elif isinstance(reply.message, Refused):
                if reply.message.code == "unknown_peer" and not isinstance(message, Hello):
                    async with self._introduction:
                        await self.request(self.hello, timeout_s=timeout_s)
                else:
                    _refused(message, reply.message, started, timeout_s)
                    await asyncio.sleep(PREDECESSOR_RETRY_S)
            else:
                return reply

    async def _attempt(self, frames: Buffers, number: int, timeout_s: float) -> Reply | None:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send_multipart(frames, copy=False)
                return await future
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(number, None)

    async def _read_replies(self) -> None:
        while True:
            read = _read(await self._socket.recv_multipart(copy=False))
            future = self._waiting.get(read[1]) if read else None
            if read and future is not None and not future.done():
                future.set_result(Reply(read[0], read[2]))

    def close(self) -> None:
        """Close at once; requests in flight are cancelled."""
        if self._reader is not None:
            self._reader.cancel()
        for future in self._waiting.values():
            future.cancel()
        self._socket.close()
