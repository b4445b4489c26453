"""The durable store: published groups in append-only files (`broker.segments`), the rest in SQLite (`broker.index`).

Invariant: after `save` returns, a restart finds the ledger and every group exactly as they were, whatever is
killed; what was not saved leaves no trace. Should the machine itself crash without `fsync`, some of the last groups may
be lost: their questions are asked again. `save` writes groups first, then one SQLite transaction that holds the
state of every changed group, where its payload lies, and the ledger's counters: one group commit for all messages
of a round. With `fsync` both wait for the disk, so that a power cut changes nothing either.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from broker.group import Rules, State
from broker.index import Change, Index, group_row, pack
from broker.ledger import Ledger
from broker.segments import Place, Segments
from broker.store import NOTHING, Entry, StoreFull, entry_size
from common.messages import GroupId
from common.run_files import LEDGER_FILE

log = logging.getLogger("slipstream.broker")

FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


class Journal:
    """A `Store` on disk (see `broker.store.Store` for the methods without a docstring of their own).

    Args:
        folder: holds `ledger.sqlite` and `payload-*.bin`; made if absent.
        fsync: wait for the disk at each save.
        record: never delete the payload of a trained group.
        read_only: open an existing journal and change nothing (`put` and `save` must not be called).

    Raises:
        UserError: the folder holds a journal of another format.
    """

    def __init__(
        self, folder: Path, *, fsync: bool = False, record: bool = False, read_only: bool = False
    ) -> None:
        self.folder, self.record = folder, record
        self.bytes_held = 0
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._index = Index(folder / LEDGER_FILE, fsync=fsync, read_only=read_only)
        self._places = dict(self._index.places())
        self._segments = Segments(folder, fsync=fsync, read_only=read_only)
        self._segments.hold(self._places.values())
        self._gone = self._segments.missing(self._places)
        if not read_only:
            self._segments.sweep()
        self._cache: dict[GroupId, Entry] = {}  # what is not consumed; the disk has it too, once saved
        self._fresh: dict[GroupId, Entry] = {}  # not saved yet
        self._meta_saved = b""

    def meta(self, name: str) -> Any:
        """A saved value, or None."""
        return self._index.meta(name)

    def identify(self, identity: dict[str, Any]) -> None:
        """Bind the journal to its run, or check that it is bound to this one.

        Args:
            identity: setting -> value, for settings that may not change within a run.

        Raises:
            UserError: names the setting that differs.
        """
        self._index.identify(identity)

    def load(self, rules: Rules) -> Ledger | None:
        """The ledger as it was saved, or None in a new journal. Groups that a crash took are pending again."""
        ledger = self._index.ledger(rules)
        if ledger is not None and self._gone:
            log.warning("%d groups were not on the disk when the machine crashed", len(self._gone))
            ledger.lose(self._gone)
        return ledger

    def results(self) -> dict[int, Any]:
        return self._index.results()

    # --- groups --------------------------------------------------------------------------------------------

    def put(self, key: GroupId, entry: Entry) -> None:
        self._uncache(key)
        self._cache[key] = self._fresh[key] = entry
        self._gone.discard(key)
        self.bytes_held += entry_size(entry)

    def get(self, key: GroupId) -> Entry | None:
        entry = self._cache.get(key)
        if entry is not None:
            return entry
        place = self._places.get(key)
        return None if place is None or key in self._gone else self._segments.read(place)

    def kept(self, key: GroupId) -> bool:
        return key in self._cache or (key in self._places and key not in self._gone)

    def consumed(self, keys: Iterable[GroupId]) -> None:
        for key in keys:
            self._uncache(key)

    def _uncache(self, key: GroupId) -> None:
        entry = self._cache.pop(key, None)
        if entry is not None:
            self.bytes_held -= entry_size(entry)

    def pin(self, step: int, ledger: Ledger) -> None:
        if self.record:
            return
        self._gone.update(
            key
            for key in self._places
            if (group := ledger.groups[key]).state == State.CONSUMED and group.step < step
        )

    # --- saving --------------------------------------------------------------------------------------------

    def save(
        self,
        ledger: Ledger,
        extra: Callable[[], dict[str, Any]] | None,
        results: Mapping[int, Any] = NOTHING,
    ) -> None:
        self._discard(ledger)
        meta = pack(ledger.meta())
        if not (ledger.dirty or self._fresh or self._gone or extra or results or meta != self._meta_saved):
            return
        try:
            written = self._segments.append(self._fresh.values())
            places = dict(zip(self._fresh, written, strict=True))
            packed = None if extra is None else pack(extra())
            self._index.save(self._change(ledger, meta, places), packed, results)
        except OSError as error:
            self._segments.undo()
            raise StoreFull(f"{self.folder}: {error.strerror}") from None
        except sqlite3.OperationalError as error:
            self._segments.undo()
            if error.sqlite_errorcode & 0xFF in FULL_CODES:
                raise StoreFull(f"{self.folder}: {error}") from None
            raise
        self._saved(ledger, meta, places)

    def _discard(self, ledger: Ledger) -> None:
        for key in ledger.discarded:
            self._uncache(key)
            self._fresh.pop(key, None)
            if key in self._places:
                self._gone.add(key)
        ledger.discarded.clear()

    def _change(self, ledger: Ledger, meta: bytes, places: dict[GroupId, Place]) -> Change:
        return Change(
            ledger=meta,
            groups=[group_row(ledger.groups[key]) for key in ledger.dirty],
            entries=[(*key, p.segment, p.start, *p.sizes, p.crc) for key, p in places.items()],
            gone=list(self._gone - places.keys()),
        )

    def _saved(self, ledger: Ledger, meta: bytes, places: dict[GroupId, Place]) -> None:
        ended = [self._places.pop(key) for key in self._gone - places.keys()]
        ended += [self._places[key] for key in places if key in self._places]
        self._places.update(places)
        self._segments.hold(places.values())
        self._segments.release(ended)
        ledger.dirty.clear()
        self._fresh.clear()
        self._gone.clear()
        self._meta_saved = meta

    def close(self) -> None:
        self._index.close()
        self._segments.close()
