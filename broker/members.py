"""Who is in the run: peers, their connections, signs of life, misbehaviour.

Invariant: a peer is a name; it may hold several connections (routing ids). Whatever arrives over a connection
that has not said Hello belongs to nobody. Both tables are bounded: strangers cost a fixed amount of memory.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import psutil

from common.messages import Heartbeat, Hello

LEFT = "left"
MAX_PEERS = 5_000
MAX_CONNECTIONS = 20_000
RATE_WINDOW_S = 60.0
FORGIVE_S = 60.0  # half of a peer's bad messages are forgiven in so long: a flood is shut out, a drip is not


class Rate:
    """Amount per second over the last minute."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()
        self._sum = 0.0
        self._since: float | None = None

    def add(self, amount: float, now: float) -> None:
        """Count `amount` at `now` (seconds)."""
        if self._since is None:
            self._since = now
        if self._points and now - self._points[-1][0] < 1.0:
            when, before = self._points.pop()
            self._points.append((when, before + amount))
        else:
            self._points.append((now, amount))
        self._sum += amount
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._points and now - self._points[0][0] > RATE_WINDOW_S:
            self._sum -= self._points.popleft()[1]

    def per_second(self, now: float) -> float:
        """Mean rate over the window, or since the first point where that is shorter."""
        self._forget(now)
        if self._since is None:
            return 0.0
        return max(0.0, self._sum) / max(1.0, min(RATE_WINDOW_S, now - self._since))


@dataclass(slots=True)
class Peer:
    """A member; `seen` is on the broker's monotonic clock, `joined` a wall-clock time.

    `here` says that its process was seen among those of this host when it joined: only then does it mean something
    that it is not there any more.
    """

    name: str
    role: str
    host: str
    pid: int
    software: str
    joined: float
    seen: float
    process: str = ""
    here: bool = False
    alive: bool = True
    farewell: str = ""
    state: str = "joining"
    waiting_for: str | None = None
    waiting_s: float = 0.0
    version: int = 0
    era: int = 0
    telemetry: dict[str, float] = field(default_factory=dict)
    clock_off: bool = False  # and that has been said
    bad: int = 0
    strikes: int = 0  # of the bad ones, not forgiven yet
    forgiven: float = 0.0  # when half of them were forgiven last
    groups: int = 0
    tokens: int = 0
    token_rate: Rate = field(default_factory=Rate)

    def is_process_of(self, hello: Hello) -> bool:
        """Whether this is the process that says Hello. The ranks of a learner are several processes of one name."""
        if self.role == "observer":
            return self.pid == hello.pid
        same = self.process == hello.process or not self.process
        return same and (self.role == "learner" or self.pid == hello.pid)

    def has_ended(self) -> bool:
        """Whether its process is known to be gone; False where that cannot be seen from here."""
        return self.here and not psutil.pid_exists(self.pid)

    def view(self, now: float) -> dict[str, Any]:
        """What `status` shows of the peer."""
        return {
            "role": self.role,
            "host": self.host,
            "pid": self.pid,
            "alive": self.alive,
            "farewell": self.farewell,
            "joined": self.joined,
            "last_seen_s": round(now - self.seen, 3),
            "state": self.state,
            "waiting_for": self.waiting_for,
            "waiting_s": self.waiting_s,
            "version": self.version,
            "era": self.era,
            "telemetry": self.telemetry,
            "bad_messages": self.bad,
            "groups": self.groups,
            "tokens": self.tokens,
            "tokens_per_s": round(self.token_rate.per_second(now), 3),
        }


class Members:
    """Peers by name and connections by routing id."""

    def __init__(self, dead_after_s: float, max_bad: int) -> None:
        self.dead_after_s = dead_after_s
        self.max_bad = max_bad
        self.peers: dict[str, Peer] = {}
        self.living_actors = 0
        self._connections: OrderedDict[bytes, str] = OrderedDict()
        self._strangers: OrderedDict[bytes, int] = OrderedDict()

    def of(self, connection: bytes) -> Peer | None:
        """The living peer of a connection."""
        name = self._connections.get(connection)
        peer = self.peers.get(name) if name is not None else None
        return peer if peer is not None and peer.alive else None

    def living(self, role: str | None = None) -> list[Peer]:
        """Peers in the run, of a role or all."""
        return [peer for peer in self.peers.values() if peer.alive and role in (None, peer.role)]

    def alive(self, name: str) -> bool:
        """Whether a peer of this name is in the run."""
        peer = self.peers.get(name)
        return peer is not None and peer.alive

    def join(self, connection: bytes, hello: Hello, now: float) -> Peer:
        """Bind a connection to its peer, new, known or come back."""
        known = self.peers.get(hello.peer)
        if known is None or not known.alive or not known.is_process_of(hello):
            peer = Peer(
                hello.peer,
                hello.role,
                hello.host,
                hello.pid,
                hello.software,
                joined=time.time(),
                seen=now,
                process=hello.process,
                here=hello.host == socket.gethostname() and psutil.pid_exists(hello.pid),
            )
            if known is not None:
                peer.bad, peer.groups, peer.tokens = known.bad, known.groups, known.tokens
                peer.strikes, peer.forgiven = known.strikes, known.forgiven
            self._enter(peer, known)
        self._connections[connection] = hello.peer
        self._connections.move_to_end(connection)
        if len(self._connections) > MAX_CONNECTIONS:
            self._connections.popitem(last=False)
        self.peers[hello.peer].seen = now
        return self.peers[hello.peer]

    def expect(self, name: str, host: str, pid: int, software: str, process: str = "", *, now: float) -> None:
        """An actor that was in the run before the broker restarted: it has leases and will say Hello again."""
        self._enter(Peer(name, "actor", host, pid, software, time.time(), now, process=process), None)

    def _enter(self, peer: Peer, known: Peer | None) -> None:
        was_there = known is not None and known.alive and known.role == "actor"
        self.living_actors += (peer.role == "actor") - was_there
        self.peers[peer.name] = peer
        if len(self.peers) >= MAX_PEERS:
            self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        for name in [name for name, peer in self.peers.items() if not peer.alive and not peer.bad]:
            del self.peers[name]

    def disconnect(self, name: str) -> None:
        """Forget the connections of a peer: they must say Hello again."""
        for connection in [c for c, peer in self._connections.items() if peer == name]:
            del self._connections[connection]

    def heard(self, peer: Peer, beat: Heartbeat) -> None:
        """Keep what a heartbeat says."""
        peer.state, peer.telemetry = beat.state, dict(beat.telemetry)
        peer.waiting_for, peer.waiting_s = beat.waiting_for, beat.waiting_s
        peer.version, peer.era = beat.version, beat.era

    def leave(self, peer: Peer, reason: str) -> None:
        """The peer is gone."""
        self.living_actors -= peer.role == "actor"
        peer.alive, peer.farewell, peer.state = False, reason, "gone"
        peer.telemetry = {}
        self.disconnect(peer.name)
        if peer.role == "observer":
            self.peers.pop(peer.name, None)

    def excuse(self, seconds: float) -> None:
        """The broker was not listening for so long."""
        for peer in self.peers.values():
            peer.seen += seconds

    def silent(self, now: float) -> list[Peer]:
        """Living peers not heard of for too long."""
        return [peer for peer in self.peers.values() if peer.alive and now - peer.seen > self.dead_after_s]

    def misbehaved(self, connection: bytes, now: float) -> int:
        """Count a bad message against whoever sent it; returns how many are held against them."""
        peer = self.peers.get(self._connections.get(connection, ""))
        if peer is not None:
            _forgive(peer, now)
            peer.bad += 1
            peer.strikes += 1
            return peer.strikes
        self._strangers[connection] = self._strangers.get(connection, 0) + 1
        if len(self._strangers) > MAX_CONNECTIONS:
            self._strangers.popitem(last=False)
        return self._strangers[connection]

    def shut_out(self, connection: bytes, now: float, name: str | None = None) -> bool:
        """Whether the sender (or the peer that it says it is) is past the limit of bad messages."""
        peer = self.peers.get(name or self._connections.get(connection, ""))
        if peer is not None:
            _forgive(peer, now)
        bad = max(peer.strikes if peer else 0, self._strangers.get(connection, 0))
        return bad >= self.max_bad


def _forgive(peer: Peer, now: float) -> None:
    """Halve what is held against a peer, once for each `FORGIVE_S` that have passed."""
    if not peer.strikes:
        peer.forgiven = now
    times = int(max(0.0, now - peer.forgiven) / FORGIVE_S)
    peer.strikes >>= times
    peer.forgiven += times * FORGIVE_S
