"""Where headers and payloads of groups are kept; here in memory, in `broker.journal` on disk.

Invariant: `save` returns only once everything put so far, and the ledger as it stands, will survive what the
store promises to survive (nothing here; a crash of the broker in the journal). ACKs wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import zmq

from broker.ledger import Ledger
from broker.profile import Profile
from common.codec import decode_part, open_frame
from common.messages import GroupHeader, GroupId, Part

NOTHING: Mapping[int, Any] = MappingProxyType({})
if TYPE_CHECKING:
    Buffer = bytes | memoryview  # what a frame can do as well, although its types do not say so
else:
    Buffer = bytes | memoryview | zmq.Frame  # a frame goes out again as it came in, without a copy


class Entry(NamedTuple):
    """A group as it was published: the frame of its `Publish` message, its three payload buffers, its profile.

    The frame is kept as it came: nothing is packed again for each group.
    """

    frame: bytes
    payload: Sequence[Buffer]
    profile: Profile | None = None

    @property
    def packed_header(self) -> msgspec.Raw:
        """The header as msgpack, cut out of the frame."""
        _, _, body = open_frame(self.frame)
        return decode_part(_Published, body, "publish").header

    @property
    def header(self) -> GroupHeader:
        """The group's header."""
        return decode_part(GroupHeader, self.packed_header, "group")


class _Published(Part, frozen=True):
    """The body of a `Publish` whose header stays packed."""

    header: msgspec.Raw


class StoreFull(Exception):  # noqa: N818 - a state of the disk, not a defect
    """No space: nothing is lost, nothing new is durable until `save` succeeds."""


class Store(Protocol):
    """What the service needs of a store."""

    bytes_held: int

    def put(self, key: GroupId, entry: Entry) -> None:
        """Keep a group that was accepted."""

    def get(self, key: GroupId) -> Entry | None:
        """A group as published, or None where it is no longer kept."""

    def kept(self, key: GroupId) -> bool:
        """Whether `get` has it."""

    def consumed(self, keys: Iterable[GroupId]) -> None:
        """These groups are trained: keep them out of memory, and only as long as a rewind may need them."""

    def pin(self, step: int, ledger: Ledger) -> None:
        """History before `step` is final: what was consumed before it may go."""

    def save(
        self,
        ledger: Ledger,
        extra: Callable[[], dict[str, Any]] | None,
        results: Mapping[int, Any] = NOTHING,
    ) -> None:
        """Make everything so far durable. Raises StoreFull; calling again later tries again.

        Args:
            ledger: its dirty and discarded groups are saved and cleared.
            extra: gives what else the run keeps, where that has changed since the last save; else None.
            results: of evaluations, by number, that are new since the last save; None deletes one.
        """

    def results(self) -> dict[int, Any]:
        """The results of evaluations that were saved, by number, in its order."""

    def close(self) -> None:
        """Release files."""


class MemoryStore:
    """`durability = "memory"`: a trained group is forgotten, a restart begins anew."""

    def __init__(self) -> None:
        self.bytes_held = 0
        self._entries: dict[GroupId, Entry] = {}

    def put(self, key: GroupId, entry: Entry) -> None:
        """Keep a group."""
        self._drop([key])
        self._entries[key] = entry
        self.bytes_held += entry_size(entry)

    def get(self, key: GroupId) -> Entry | None:
        """A group as published, or None."""
        return self._entries.get(key)

    def kept(self, key: GroupId) -> bool:
        """Whether the group is still here."""
        return key in self._entries

    def consumed(self, keys: Iterable[GroupId]) -> None:
        """Forget trained groups: a rewind will ask for their questions again."""
        self._drop(keys)

    def _drop(self, keys: Iterable[GroupId]) -> None:
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes_held -= entry_size(entry)

    def pin(self, step: int, ledger: Ledger) -> None:
        """Nothing to prune."""

    def save(
        self,
        ledger: Ledger,
        extra: Callable[[], dict[str, Any]] | None,
        results: Mapping[int, Any] = NOTHING,
    ) -> None:
        """Forget what the ledger discarded; nothing is durable."""
        self._drop(ledger.discarded)
        ledger.discarded.clear()
        ledger.dirty.clear()

    def results(self) -> dict[int, Any]:
        """Nothing is kept."""
        return {}

    def close(self) -> None:
        """Nothing to close."""


def entry_size(entry: Entry) -> int:
    """Bytes of a header and its payload."""
    return len(entry.frame) + sum(len(part) for part in entry.payload)
