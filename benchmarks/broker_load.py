"""Load for `benchmarks.broker`: actors and a learner that cost little themselves, and the relay to compare with.

Invariant: the frames are those of the real messages; only their making is cut short (one payload for all groups,
the responses' headers packed once), so that the machine's time goes to the broker and to the relay alike. Actors
and learner are processes of their own, as they are in a run.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zmq

from common.codec import encode_plain

HIGH_WATER_MARK = 64
LEASE_WAIT_S = 1.0
SOFTWARE = "0.1.0"


class Clock(NamedTuple):
    """Seconds on the wall, and of CPU (user and system, all threads) that the server has spent."""

    wall: float
    cpu: float


class Rate(NamedTuple):
    """Payload bytes per second of wall time, and per CPU second of the server."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, size: int, start: Clock, end: Clock) -> Rate:
        """The rate of `size` bytes between two readings."""
        return cls(size / (end.wall - start.wall), size / max(1e-2, end.cpu - start.cpu))


@functools.cache
def payload_of(samples: int, tokens: int) -> list[bytes]:
    """Three buffers: a prompt of 100 ids, and ids and log-probabilities of all responses."""
    rng = np.random.default_rng(0)
    total = samples * tokens
    ids = rng.integers(0, 150_000, size=total, dtype=np.int32)
    return [
        np.arange(100, dtype=np.int32).tobytes(),
        ids.tobytes(),
        (-rng.random(total, dtype=np.float32)).tobytes(),
    ]


def publish_frames(
    assignment: dict[str, Any],
    actor: str,
    samples: int,
    tokens: int,
    policy: tuple[int, int],
    request: int = 0,
) -> list[bytes]:
    """A `Publish` message and its payload; half of the responses are right."""
    header = {
        "group": assignment["group"],
        "lease": assignment["lease"],
        "era": policy[0],
        "actor": actor,
        "prompt_tokens": 100,
        "responses": responses(samples, tokens, policy[1]),
    }
    return [encode_plain("publish", request, {"header": header}), *payload_of(samples, tokens)]


@functools.cache
def responses(samples: int, tokens: int, version: int) -> msgspec.Raw:
    """Packed headers of a group's responses."""
    headers = [
        {
            "tokens": tokens,
            "reward": float(i % 2),
            "verdict": "correct" if i % 2 else "wrong",
            "finish": "stop",
            "versions": [[version, tokens]],
        }
        for i in range(samples)
    ]
    return msgspec.Raw(msgspec.msgpack.encode(headers))


_reply = msgspec.msgpack.Decoder(tuple[int, str, int, msgspec.Raw])
_body = msgspec.msgpack.Decoder(dict[str, Any])


class _Taken(msgspec.Struct):
    """What the load reads of a group in a `Batch`; the rest is skipped."""

    group: tuple[int, int]


class _Batch(msgspec.Struct):
    """What the load reads of a `Batch`."""

    ready: bool
    groups: list[_Taken] = []
    reason: str | None = None


_batch = msgspec.msgpack.Decoder(_Batch)


class Connection:
    """A DEALER with numbered requests."""

    def __init__(self, address: str, role: str, name: str, context: zmq.Context | None = None) -> None:
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.connect(f"tcp://{address}")
        self.numbers = itertools.count(1)
        # Replies that nobody has asked for yet, by their request's number.
        self.early: dict[int, tuple[msgspec.Raw, list[zmq.Frame]]] = {}
        hello = {"role": role, "peer": name, "software": SOFTWARE, "host": "benchmark", "pid": 1}
        self.welcome = self.ask("hello", hello)

    def send(self, kind: str, body: dict[str, Any]) -> int:
        number = next(self.numbers)
        self.socket.send(encode_plain(kind, number, body))
        return number

    def receive(self, flags: int = 0) -> tuple[str, int, msgspec.Raw, list[zmq.Frame]]:
        """Kind, number, packed body and payload of the next reply."""
        header, *payload = self.socket.recv_multipart(flags, copy=False)
        _, kind, number, body = _reply.decode(header.buffer)
        return kind, number, body, payload

    def ask(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        return _body.decode(self.answer(self.send(kind, body))[0])

    def answer(self, number: int) -> tuple[msgspec.Raw, list[zmq.Frame]]:
        """Packed body and payload of the reply to request `number`; replies to others are kept."""
        while number not in self.early:
            kind, answered, body, payload = self.receive()
            if kind == "refused":
                raise RuntimeError(_body.decode(body)["reason"])
            self.early[answered] = body, payload
        return self.early.pop(number)


class Learner(Connection):
    """Takes, fetches and commits step after step; the next step is asked for while this one's payload travels.

    `policy` is era and version, shared with the actors: what they hold at once, as if weights took no time.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address, "learner", "learner")
        self.received = 0
        self.step = 0
        self.policy: Any = [0, 0]
        self._taken: int | None = None  # number of the `Take` of `step`, once it is sent

    def status(self) -> dict[str, Any]:
        return self.ask("status_query", {"groups": False})["status"]

    def rewind(self) -> None:
        self.policy[0], self.policy[1] = self.ask("rewind", {"step": 0, "version": 0})["era"], 0

    def train(self, steps: int) -> None:
        """So many steps; the last one's successor is asked for already, for the next call."""
        for _ in range(steps):
            if self._taken is None:
                self._taken = self._take(self.step)
            batch = _batch.decode(self.answer(self._taken)[0])
            if not batch.ready:
                raise RuntimeError(f"step {self.step}: {batch.reason}")
            fetch = self.send("fetch", {"groups": [taken.group for taken in batch.groups]})
            self._taken = self._take(self.step + 1)
            self.received += sum(map(len, self.answer(fetch)[1]))
            commit = self.send("commit", {"step": self.step, "version": self.step + 1, "metrics": {}})
            self.answer(commit)
            self.step += 1
            self.policy[1] = self.step

    def _take(self, step: int) -> int:
        return self.send("take", {"step": step, "wait_s": 60.0})


class ActorFleet:
    """Many actors in one thread: each leases, publishes, waits for its ACK, and sends heartbeats.

    Args:
        policy: era and version, shared with the learner.
        window: groups that the broker admits at one time, shared out among the actors.
        heartbeat_s: seconds between an actor's heartbeats, which say what policy it holds.
    """

    def __init__(
        self,
        address: str,
        count: int,
        samples: int,
        tokens: int,
        *,
        policy: Any,
        window: int,
        heartbeat_s: float,
    ) -> None:
        self.shape, self.policy, self.heartbeat_s = (samples, tokens), policy, heartbeat_s
        context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, count + 100)
        self.actors = [Connection(address, "actor", f"actor-{i}", context) for i in range(count)]
        self.names = {id(actor.socket): f"actor-{i}" for i, actor in enumerate(self.actors)}
        self.capacity = max(1, min(32, window // count))
        self._open = {id(actor.socket): 0 for actor in self.actors}

    def run(self) -> None:
        """Serve every connection as replies come in, for good."""
        poller = zmq.Poller()
        by_socket = {actor.socket: actor for actor in self.actors}
        for actor in self.actors:
            poller.register(actor.socket, zmq.POLLIN)
            self._lease(actor)
        next_beat = time.monotonic()
        while True:
            for socket, _ in poller.poll(5):
                self._answer_all(by_socket[socket])
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.heartbeat_s
                era, version = self.policy
                for actor in self.actors:
                    actor.send("heartbeat", {"state": "working", "era": era, "version": version})

    def _lease(self, actor: Connection) -> None:
        era, version = self.policy
        body = {"capacity": self.capacity, "era": era, "version": version, "wait_s": LEASE_WAIT_S}
        actor.send("lease", body)

    def _answer_all(self, actor: Connection) -> None:
        with suppress(zmq.Again):
            while True:
                kind, _, content, _ = actor.receive(zmq.NOBLOCK)
                self._answer(actor, kind, content)

    def _answer(self, actor: Connection, kind: str, content: msgspec.Raw) -> None:
        if kind == "grant":
            self._publish(actor, _body.decode(content)["groups"])
        elif kind == "ack":
            self._open[id(actor.socket)] -= 1
            if not self._open[id(actor.socket)]:
                self._lease(actor)
        elif kind == "refused":
            raise RuntimeError(_body.decode(content)["reason"])

    def _publish(self, actor: Connection, groups: list[dict[str, Any]]) -> None:
        if not groups:
            self._lease(actor)
        self._open[id(actor.socket)] = len(groups)
        for assignment in groups:
            frames = publish_frames(
                assignment,
                self.names[id(actor.socket)],
                *self.shape,
                (self.policy[0], self.policy[1]),
                next(actor.numbers),
            )
            actor.socket.send_multipart(frames)  # below 64 KiB a copy is cheaper than its avoidance


def actor_fleet(address: str, policy: Any, options: dict[str, Any]) -> None:
    """Target of a process: a fleet at work."""
    ActorFleet(address, policy=policy, **options).run()


# --- the reference -----------------------------------------------------------------------------------------


def relay(front: str, back: str) -> None:
    """ROUTER -> DEALER, frame by frame, nothing else: the least that a broker in Python could do."""
    context = zmq.Context()
    incoming, outgoing = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket, address in ((incoming, front), (outgoing, back)):
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.bind(address)
    while True:
        frames = incoming.recv_multipart(copy=False)
        outgoing.send_multipart(frames[1:], copy=False)


def relay_load(
    front: str, back: str, frames: list[bytes], *, groups: int, warm: int, clock: Callable[[], Clock]
) -> Rate:
    """Payload through the relay, after `warm` groups."""
    context = zmq.Context.instance()
    sender, receiver = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket, address in ((sender, front), (receiver, back)):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.connect(address)

    def send() -> None:
        for _ in range(groups):
            sender.send_multipart(frames)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    received, started = 0, clock()
    for number in range(groups):
        if number == warm:
            received, started = 0, clock()
        _, *payload = receiver.recv_multipart(copy=False)
        received += sum(map(len, payload))
    rate = Rate.of(received, started, clock())
    thread.join()
    sender.close()
    receiver.close()
    return rate
