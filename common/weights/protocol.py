"""What learner and receivers tell each other through the store: keys, events and the offer.

Invariant: every message is JSON of the fields below; a link is named after its actor and generation, and a
name is never used twice, so that a late message of a dead link cannot be taken for one of the living.

    receiver -> learner   queue "events": register, accepted, refused, staged, held, committed, failed, bye,
                          and relayed or relay_failed from a receiver that passes a version on
    learner -> receiver   "{link}/offer/{n}" (n = 0, 1, ...), "{edge}/go/{push}", "{link}/dropped"
    worker -> its driver  "{link}/staged/{push}/{rank}"
    for all               "manifest/{digest}", "checksums/{push}", "probe/{push}" (see `common.weights.probe`)
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

EVENTS = "events"

# A link that moves less than this is treated as failed: the deadline of a whole push grows with its size.
SLOWEST_BYTES_PER_S = 50e6


@dataclass(frozen=True)
class Hop:
    """One edge of the relay tree: a group of a sender (rank 0) and the `workers` ranks of a receiver."""

    edge: str
    workers: int


@dataclass(frozen=True)
class Offer:
    """One version offered to one link.

    Attributes:
        push: counts the publisher's versions; unlike `version` it never repeats.
        manifest: digest under which the manifest is stored.
        nbytes: of all buckets.
        ticket: what the route needs besides (a path, shared-memory handles).
        hop: the edge to receive from, for routes that use groups.
        relays: edges to pass the staged copy on to.
        checksums: whether checksums are stored for this push.
        deadline_s: for each single wait.
    """

    push: int
    version: int
    manifest: str
    bucket_bytes: int
    nbytes: int
    ticket: Mapping[str, Any]
    hop: Hop | None
    relays: tuple[Hop, ...]
    checksums: bool
    deadline_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Offer:
        hop = Hop(**body["hop"]) if body["hop"] else None
        return cls(**{**body, "hop": hop, "relays": tuple(Hop(**relay) for relay in body["relays"])})

    @property
    def push_deadline_s(self) -> float:
        return push_deadline(self.nbytes, self.deadline_s)


@dataclass(frozen=True)
class LinkSpec:
    """What one receiving worker needs to know of its link; plain values, so that any RPC can carry it.

    `workers` receiving ranks (tensor parallel x pipeline parallel) share the link; the ranks are 0-based here
    and shifted by one in a group, where rank 0 is the sender.
    """

    address: str
    run_id: str
    link: str
    workers: int
    deadline_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Registration:
    """How a receiver introduces itself; `version` is what it already holds from this very publisher."""

    link: str
    actor_id: str
    node: str
    workers: int
    version: int | None = None


def new_link_name(actor_id: str, generation: int) -> str:
    return f"{actor_id}.{generation}.{uuid.uuid4().hex[:8]}"


def probe_key(push: int) -> str:
    return f"probe/{push}"


def edge_name(parent: str | None, child: str) -> str:
    """Group name of the edge; the learner's own edges have no parent."""
    return f"edge/{parent or 'learner'}/{child}"


def push_deadline(nbytes: int, deadline_s: float) -> float:
    """Seconds for a whole push: one deadline plus the transfer at the slowest rate that counts as alive."""
    return deadline_s + nbytes / SLOWEST_BYTES_PER_S


def commit_deadline(deadline_s: float) -> float:
    """Seconds for a commit. On a GPU it may have to wait for the device (to free memory is enough), which a relay to a frozen
    child occupies until its own deadline: an engine that outlives that is not damaged, and its link has not failed."""
    return 2 * deadline_s + 5.0


def encode(value: object) -> str:
    return json.dumps(value)


def decode(text: str | bytes) -> Any:
    return json.loads(text)
