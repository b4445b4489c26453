"""The publisher's state machine: which link gets which version from whom, and what happens when one fails.

Invariant: every registered link is always in exactly one state and every state but IDLE, WAITING and HELD has
a deadline, so no link can hold up another or be forgotten; a link that is behind and idle is offered the
newest version at once. The learner is named as parent only of links that it serves itself.

Pure logic: no sockets, threads or clocks. Events and the time go in, actions come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from common.weights.errors import Cause
from common.weights.plan import Endpoint, plan_tree
from common.weights.protocol import commit_deadline, push_deadline

ACCEPT_SHARE = 1 / 2  # of the deadline: an offer is answered before anything is moved, so it may take less

# How long a link that the learner serves counts against the degree. A frozen one must not hold up others until
# its deadline, so after this time it is served beside the others.
PATIENCE_S, BRISK_BYTES_PER_S = 1.0, 500e6


class State(Enum):
    """Where a link stands with its current push."""

    IDLE = "idle"  # nothing under way
    WAITING = "waiting"  # for its relay to have staged the version
    OFFERED = "offered"  # asked whether it takes the version
    RECEIVING = "receiving"
    STAGED = "staged"  # complete; the receiver is committing
    HELD = "held"  # the receiver postpones its commit (an evaluation is in flight)


@dataclass
class Link:
    """One connection of one receiver, from its registration until it fails or leaves."""

    name: str
    actor_id: str
    node: str
    workers: int
    version: int | None = None
    state: State = State.IDLE
    push: int | None = None  # under way
    done_push: int | None = None  # the last one committed, or refused
    parent: str | None = None
    since: float = 0.0  # of the current offer
    deadline: float = float("inf")


@dataclass(frozen=True)
class Push:
    """One published version. `number` never repeats, `version` may (after a rewind).

    The rest is what every offer of it says: digest of its manifest, bucket size, bytes in all, and whether
    checksums are to be compared.
    """

    number: int
    version: int
    nbytes: int
    manifest: str = ""
    bucket_bytes: int = 0
    checksums: bool = False


@dataclass(frozen=True)
class MakeOffer:
    """Offer `push` to `link`, to be received from `parent` and passed on to `children` (link names)."""

    link: str
    push: int
    parent: str | None
    children: tuple[str, ...]


@dataclass(frozen=True)
class StartSend:
    """The learner itself sends `push` to `link`."""

    link: str
    push: int


@dataclass(frozen=True)
class SteerRelay:
    """Tell `parent` to start passing `push` on to `child`, which is ready, or that it need not (`go` = False)."""

    parent: str
    child: str
    push: int
    go: bool


@dataclass(frozen=True)
class DropLink:
    """Close the learner's side of `link` and tell the receiver, should it be alive, to open a new one."""

    link: str
    reason: str


Action = MakeOffer | StartSend | SteerRelay | DropLink


@dataclass
class ActorMeters:
    """What is known of one actor, over all its links. Seconds and milliseconds of its last push."""

    version: int | None = None
    pushes: int = 0
    staged_s: float = 0.0
    stopped_ms: float = 0.0


@dataclass
class Dispatcher:
    """Links, their states and the newest version.

    Args:
        degree: links that the learner, and each relay, serves at a time.
        deadline_s: longest single wait.
        relays: whether receivers pass versions on (routes over groups only).
    """

    degree: int
    deadline_s: float
    relays: bool = True
    links: dict[str, Link] = field(default_factory=dict)
    latest: Push | None = None
    pushes: dict[int, Push] = field(default_factory=dict)
    failures: Counter[Cause] = field(default_factory=Counter)
    actors: dict[str, ActorMeters] = field(default_factory=dict)
    bytes_relayed: int = 0
    fatal: str | None = None
    _actions: list[Action] = field(default_factory=list)

    # ---------------------------------------------------------------- inputs

    def publish(self, push: Push) -> None:
        """A new version is ready to be offered. Links still waiting for an older one wait no longer."""
        self.latest = push
        self.pushes[push.number] = push
        for link in self.links.values():
            if link.state is State.WAITING:
                self._to_idle(link)
        self.pushes = {n: p for n, p in self.pushes.items() if n in self.pushes_in_use()}

    def event(self, event: Mapping[str, Any], now: float) -> None:
        """One message of a receiver; unknown links and stale pushes are ignored (late messages of the dead)."""
        kind = event["event"]
        if kind == "register":
            self._register(event)
            return
        if kind == "relay_failed":
            self._relay_failed(event)
            return
        link = self.links.get(event["link"])
        if link is None:
            return
        if kind == "relayed":
            push = self.pushes.get(event["push"])
            self.bytes_relayed += push.nbytes if push else 0
        elif kind == "bye":
            self.drop_actor(link.actor_id, "left")
        elif kind == "failed" and event["cause"] != Cause.SUPERSEDED:
            if event["cause"] == Cause.CHECKSUM:
                self.fatal = f"actor {link.actor_id}: {event['reason']}"
            self.drop(link.name, Cause(event["cause"]), event["reason"])
        elif event.get("push") == link.push:
            self._progress(link, kind, event, now)

    def withdraw(self, name: str) -> None:
        """An offer could not be made after all (its snapshot was given up): the link is idle again."""
        if (link := self.links.get(name)) is not None:
            self._release_children(link)
            self._to_idle(link)

    def drop(self, name: str, cause: Cause | None, reason: str) -> None:
        """Forgets a link. Its children in the tree are served by others, those in mid-transfer reconnect."""
        link = self.links.pop(name, None)
        if link is None:
            return
        if cause is not None:
            self.failures[cause] += 1
        self._call_off(link)
        self._actions.append(DropLink(name, reason))
        for child in [child for child in self.links.values() if child.parent == name]:
            if child.state is State.WAITING:
                self._to_idle(child)
            elif child.state in (State.OFFERED, State.RECEIVING):
                self.drop(child.name, Cause.PEER_LOST, f"its relay {name} was lost")

    def drop_actor(self, actor_id: str, reason: str) -> None:
        """The broker's membership says that the actor is gone."""
        for link in [link for link in self.links.values() if link.actor_id == actor_id]:
            self.drop(link.name, Cause.LEFT, reason)
        self.actors.pop(actor_id, None)

    def actions(self, now: float) -> list[Action]:
        """Applies deadlines, offers the newest version to whoever is behind; what is to be done, in order."""
        for link in [link for link in self.links.values() if link.deadline < now]:
            self.drop(link.name, Cause.DEADLINE, f"no progress ({link.state.value}) within the deadline")
        self._offer_latest(now)
        taken, self._actions = self._actions, []
        return taken

    def pushes_in_use(self) -> set[int]:
        """The newest push and every one that some link is still at."""
        own = {link.push for link in self.links.values() if link.push is not None}
        return own | ({self.latest.number} if self.latest else set())

    @property
    def busy(self) -> bool:
        return any(link.state is not State.IDLE for link in self.links.values())

    # ---------------------------------------------------------------- transitions

    def _register(self, event: Mapping[str, Any]) -> None:
        for old in [link for link in self.links.values() if link.actor_id == event["actor_id"]]:
            self.drop(old.name, None, "the actor opened a new link")
        link = Link(event["link"], event["actor_id"], event["node"], event["workers"], event["version"])
        if self.latest is not None and link.version == self.latest.version:
            link.done_push = self.latest.number
        self.links[link.name] = link
        self.actors.setdefault(link.actor_id, ActorMeters()).version = link.version

    def _progress(self, link: Link, kind: str, event: Mapping[str, Any], now: float) -> None:
        if kind == "accepted" and link.state is State.OFFERED:
            self._accepted(link, now)
        elif kind == "staged" and link.state is State.RECEIVING:
            link.state, link.deadline = State.STAGED, now + commit_deadline(self.deadline_s)
            self._serve_children(link, now)
        elif kind == "held" and link.state is State.STAGED:
            link.state, link.deadline = State.HELD, float("inf")
        elif kind == "committed":
            self._committed(link, event)
        elif kind == "refused":
            self.failures[Cause.REFUSED] += 1
            self._finish(link)
        elif kind == "failed":  # superseded: the link is healthy and gets the newest version
            self.failures[Cause.SUPERSEDED] += 1
            self.withdraw(link.name)

    def _accepted(self, link: Link, now: float) -> None:
        assert link.push is not None
        link.state = State.RECEIVING
        link.deadline = now + push_deadline(self.pushes[link.push].nbytes, self.deadline_s)
        if not self.relays:
            return
        if link.parent is None:
            self._actions.append(StartSend(link.name, link.push))
        else:
            self._actions.append(SteerRelay(link.parent, link.name, link.push, go=True))

    def _committed(self, link: Link, event: Mapping[str, Any]) -> None:
        assert link.push is not None
        meters = self.actors.setdefault(link.actor_id, ActorMeters())
        link.version = meters.version = self.pushes[link.push].version
        meters.pushes += 1
        meters.staged_s, meters.stopped_ms = event["staged_s"], event["stopped_ms"]
        self._finish(link)

    def _finish(self, link: Link) -> None:
        """The link is through with its push, for better or worse."""
        link.done_push = link.push
        self._release_children(link)
        self._to_idle(link)

    def _serve_children(self, link: Link, now: float) -> None:
        for child in self._children(link):
            self._offer(child, link.name, now)

    def _release_children(self, link: Link) -> None:
        for child in self._children(link):
            self._to_idle(child)

    def _children(self, link: Link) -> list[Link]:
        """Links still waiting for `link` to have the version."""
        return [c for c in self.links.values() if c.parent == link.name and c.state is State.WAITING]

    def _relay_failed(self, event: Mapping[str, Any]) -> None:
        for child in list(self.links.values()):
            relayed = child.parent == event["link"] and child.push == event["push"]
            if relayed and child.state is State.RECEIVING and event["edge"].endswith("/" + child.name):
                self.drop(child.name, Cause.PEER_LOST, f"its relay failed: {event['reason']}")

    def _call_off(self, link: Link) -> None:
        """The relay of a link that is not going to receive from it must not keep its copy for it."""
        relay = self.links.get(link.parent) if link.parent else None
        if relay is None or relay.state in (State.IDLE, State.WAITING):
            return  # it was never told of the child, or knows already
        if link.push is not None and link.state in (State.WAITING, State.OFFERED):
            self._actions.append(SteerRelay(relay.name, link.name, link.push, go=False))

    def _to_idle(self, link: Link) -> None:
        self._call_off(link)
        link.state, link.push, link.parent, link.deadline = State.IDLE, None, None, float("inf")
        self._release_children(link)  # those below it in the tree waited for a version that it will not get

    # ---------------------------------------------------------------- offering

    def _offer_latest(self, now: float) -> None:
        if self.latest is None:
            return
        newest = self.latest.number
        behind = [x for x in self.links.values() if x.state is State.IDLE and x.done_push != newest]
        roots = self._free_slots(now) if self.relays else len(behind)
        if not behind or not roots:
            return
        endpoints = [Endpoint(link.name, link.node) for link in behind]
        parents = (
            plan_tree(endpoints, self.degree, roots)
            if self.relays
            else dict.fromkeys(e.name for e in endpoints)
        )
        for name, parent in parents.items():
            link = self.links[name]
            link.push, link.parent, link.state = newest, parent, State.WAITING
        for name, parent in parents.items():
            if parent is None:
                self._offer(self.links[name], None, now)

    def _free_slots(self, now: float) -> int:
        """Links that the learner may take on now; who is served slowly gathers into the next tree meanwhile."""
        return self.degree - sum(self._counts_against_degree(link, now) for link in self.links.values())

    def _counts_against_degree(self, link: Link, now: float) -> bool:
        if link.parent is not None or link.state not in (State.OFFERED, State.RECEIVING):
            return False
        assert link.push is not None
        return now - link.since < PATIENCE_S + self.pushes[link.push].nbytes / BRISK_BYTES_PER_S

    def _offer(self, link: Link, parent: str | None, now: float) -> None:
        assert link.push is not None
        link.state, link.parent, link.since = State.OFFERED, parent, now
        link.deadline = now + self.deadline_s * ACCEPT_SHARE
        children = tuple(child.name for child in self._children(link))
        self._actions.append(MakeOffer(link.name, link.push, parent, children))
