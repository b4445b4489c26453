"""Replies on their way out.

Invariant: a reply that confirms a change of state leaves only after the store has saved that change; if it
cannot, the peer is told `full` instead and asks again later (requests are idempotent).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from broker.store import Buffer
from common.codec import encode, encode_plain
from common.messages import Message, Refused


class Origin(NamedTuple):
    """Where a request came from: the routing id of its connection, and its number."""

    connection: bytes
    request: int


class Outgoing(NamedTuple):
    """A reply: frames after the routing id; `durable` ones wait for the store."""

    origin: Origin
    frames: Sequence[Buffer]
    durable: bool


class Outbox:
    """Collects replies until the loop sends them."""

    def __init__(self) -> None:
        self._replies: list[Outgoing] = []

    def reply(
        self, origin: Origin, message: Message, payload: Sequence[Buffer] = (), *, durable: bool = False
    ) -> None:
        """Answer with a message."""
        self._replies.append(Outgoing(origin, [encode(message, origin.request), *payload], durable))

    def reply_plain(
        self, origin: Origin, kind: str, body: Mapping[str, Any], *, durable: bool = False
    ) -> None:
        """Answer with a body of plain values that were validated when they came in (no second validation)."""
        self._replies.append(Outgoing(origin, [encode_plain(kind, origin.request, body)], durable))

    def refuse(self, origin: Origin, code: Any, reason: str, passes_s: float = 0.0) -> None:
        """Answer that nothing was done, and why; `passes_s` as in `Refused`."""
        self.reply(origin, Refused(code=code, reason=reason, passes_s=passes_s))

    def empty(self, *, full: str | None = None) -> list[Outgoing]:
        """Everything to send now; with `full`, durable replies become refusals with that reason."""
        replies, self._replies = self._replies, []
        if full is None:
            return replies
        return [self._refused(reply, full) if reply.durable else reply for reply in replies]

    @staticmethod
    def _refused(reply: Outgoing, reason: str) -> Outgoing:
        return Outgoing(
            reply.origin, [encode(Refused(code="full", reason=reason), reply.origin.request)], False
        )
