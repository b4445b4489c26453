"""The durable store: an SQLite index (WAL) and append-only segment files for payloads.

Invariant: after `save` returns, a restart finds the ledger and every group exactly as they were, whatever is
killed; what was not saved leaves no trace. `save` writes payloads first, then one SQLite transaction that holds
the state of every changed group, where its payload lies, and the ledger's counters: one group commit for all
messages of a round. With `fsync` both wait for the disk, so that a power cut changes nothing either.

Payloads lie in segments because that is 6 x faster than BLOBs (3,200 groups of 66 kB in commits of 16, one core:
2.2 GB/s against 0.36 GB/s). A segment is deleted when none of its groups can be asked for again.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from broker.group import Group, Rules, State
from broker.ledger import Ledger
from broker.store import Buffer, Entry, StoreFull, entry_size
from common.errors import UserError
from common.messages import GroupId

FORMAT = 1
SEGMENT_BYTES = 256 << 20
IOV_MAX = 512
FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    epoch INTEGER, idx INTEGER, position INTEGER, state INTEGER, lease INTEGER, failures INTEGER, actor TEXT,
    era INTEGER, oldest INTEGER, newest INTEGER, step INTEGER, reward REAL, tokens INTEGER,
    PRIMARY KEY (epoch, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    epoch INTEGER, idx INTEGER, frame BLOB, segment INTEGER, start INTEGER, a INTEGER, b INTEGER, c INTEGER,
    PRIMARY KEY (epoch, idx)
) WITHOUT ROWID;
"""


class Place(NamedTuple):
    """Where a payload lies: segment number, offset in bytes, sizes of the three buffers in bytes."""

    segment: int
    start: int
    sizes: tuple[int, ...]


class Journal:
    """A `Store` on disk (see `broker.store.Store` for the methods without a docstring of their own).

    Args:
        folder: holds `ledger.sqlite` and `payload-*.bin`; made if absent.
        fsync: wait for the disk at each save.
        record: never delete the payload of a trained group.
        read_only: open an existing journal and change nothing (`put` and `save` must not be called).
    """

    def __init__(
        self, folder: Path, *, fsync: bool = False, record: bool = False, read_only: bool = False
    ) -> None:
        self.folder, self.fsync, self.record = folder, fsync, record
        self.bytes_held = 0
        self._db = self._read_database() if read_only else self._open_database()
        self._cache: dict[GroupId, Entry] = {}  # what is not consumed; the disk has it too, once saved
        self._fresh: dict[GroupId, Entry] = {}  # not saved yet
        self._places: dict[GroupId, Place] = {}
        self._gone: set[GroupId] = set()
        self._live: Counter[int] = Counter()  # groups per segment
        self._readers: dict[int, int] = {}
        self._meta_saved = b""
        self._load_places()
        self._segment = max(self._numbers(), default=0)
        self._writer, self._end = -1, 0
        if not read_only:
            self._open_segment()

    # --- opening -------------------------------------------------------------------------------------------

    def _read_database(self) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{self.folder / 'ledger.sqlite'}?mode=ro", isolation_level=None, uri=True
        )

    def _open_database(self) -> sqlite3.Connection:
        self.folder.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.folder / "ledger.sqlite", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 8192")
        db.execute(f"PRAGMA synchronous = {'FULL' if self.fsync else 'NORMAL'}")
        db.executescript(SCHEMA)
        return db

    def _load_places(self) -> None:
        for epoch, index, segment, start, *sizes in self._db.execute(
            "SELECT epoch, idx, segment, start, a, b, c FROM entries"
        ):
            self._places[GroupId(epoch, index)] = Place(segment, start, tuple(sizes))
            self._live[segment] += 1

    def _numbers(self) -> list[int]:
        return [int(path.stem.removeprefix("payload-")) for path in self.folder.glob("payload-*.bin")]

    def _path(self, segment: int) -> Path:
        return self.folder / f"payload-{segment:06d}.bin"

    def _open_segment(self) -> None:
        """Begin a new segment: whatever a crash left at the end of the last one is never read."""
        if self._writer >= 0:
            os.close(self._writer)
        self._segment += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._writer, self._end = os.open(self._path(self._segment), flags, 0o644), 0
        if self.fsync:
            _sync_folder(self.folder)

    def meta(self, name: str) -> Any:
        """A saved value, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return msgpack.unpackb(row[0], raw=False, strict_map_key=False) if row else None

    def identify(self, identity: dict[str, Any]) -> None:
        """Bind the journal to its run, or check that it is bound to this one.

        Args:
            identity: setting -> value, for settings that may not change within a run.

        Raises:
            UserError: names the setting that differs.
        """
        known = self.meta("identity")
        if known is None:
            self._db.execute(
                "INSERT INTO meta VALUES ('identity', ?)", (_pack({"format": FORMAT, **identity}),)
            )
            return
        if known["format"] != FORMAT:
            raise UserError(
                f"the journal in '{self.folder}' has format {known['format']}; this software reads {FORMAT}."
            )
        for setting, value in identity.items():
            if known.get(setting) != value:
                raise UserError(
                    f"it was {known.get(setting)!r} when the run in '{self.folder.parent}' began and is {value!r} now; "
                    "it may not change within a run.",
                    setting=setting,
                )

    def load(self, rules: Rules) -> Ledger | None:
        """The ledger as it was saved, or None in a new journal."""
        meta = self.meta("ledger")
        if meta is None:
            return None
        rows = self._db.execute(
            "SELECT epoch, idx, position, state, lease, failures, actor, era, oldest, newest, step, reward, tokens "
            "FROM groups"
        )
        groups = (Group(GroupId(row[0], row[1]), row[2], State(row[3]), *row[4:]) for row in rows)
        return Ledger.restore(rules, meta, groups)

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
        if place is None or key in self._gone:
            return None
        (frame,) = self._db.execute("SELECT frame FROM entries WHERE epoch = ? AND idx = ?", key).fetchone()
        return Entry(frame, self._read(place))

    def _read(self, place: Place) -> list[Buffer]:
        if place.segment not in self._readers:
            self._readers[place.segment] = os.open(self._path(place.segment), os.O_RDONLY | os.O_CLOEXEC)
        wanted = sum(place.sizes)
        data = os.pread(self._readers[place.segment], wanted, place.start)
        if len(data) != wanted:
            raise OSError(
                f"{self._path(place.segment)} is damaged: {wanted} bytes at {place.start} are missing"
            )
        view, parts, start = memoryview(data), [], 0
        for size in place.sizes:
            parts.append(view[start : start + size])
            start += size
        return parts

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

    def save(self, ledger: Ledger, extra: Callable[[], dict[str, Any]] | None) -> None:
        self._discard(ledger)
        meta = _pack(ledger.meta())
        if not (ledger.dirty or self._fresh or self._gone or extra or meta != self._meta_saved):
            return
        if self._end > SEGMENT_BYTES:
            self._open_segment()
        before = self._end
        try:
            places = self._write_payloads()
            self._transaction(ledger, meta, extra, places)
        except OSError as error:
            self._undo(before)
            raise StoreFull(f"{self.folder}: {error.strerror}") from None
        except sqlite3.OperationalError as error:
            self._undo(before)
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

    def _write_payloads(self) -> dict[GroupId, Place]:
        places, buffers, end = {}, [], self._end
        for key, entry in self._fresh.items():
            sizes = tuple(len(part) for part in entry.payload)
            places[key] = Place(self._segment, end, sizes)
            end += sum(sizes)
            buffers += entry.payload
        for first in range(0, len(buffers), IOV_MAX):
            _write_all(self._writer, buffers[first : first + IOV_MAX])
        if buffers and self.fsync:
            os.fdatasync(self._writer)
        self._end = end
        return places

    def _transaction(
        self,
        ledger: Ledger,
        meta: bytes,
        extra: Callable[[], dict[str, Any]] | None,
        places: dict[GroupId, Place],
    ) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            f"INSERT OR REPLACE INTO groups VALUES ({', '.join('?' * 13)})",
            [_row(ledger.groups[key]) for key in ledger.dirty],
        )
        db.executemany("DELETE FROM entries WHERE epoch = ? AND idx = ?", self._gone - places.keys())
        db.executemany(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(*key, self._fresh[key].frame, p.segment, p.start, *p.sizes) for key, p in places.items()],
        )
        db.execute("INSERT OR REPLACE INTO meta VALUES ('ledger', ?)", (meta,))
        if extra is not None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('extra', ?)", (_pack(extra()),))
        db.execute("COMMIT")

    def _undo(self, end: int) -> None:
        """Take back a failed save: the segment ends where it did, the transaction never was."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        os.ftruncate(self._writer, end)
        self._end = end

    def _saved(self, ledger: Ledger, meta: bytes, places: dict[GroupId, Place]) -> None:
        touched = set()
        for key in [*(self._gone - places.keys()), *(key for key in places if key in self._places)]:
            segment = self._places.pop(key).segment
            self._live[segment] -= 1
            touched.add(segment)
        self._places.update(places)
        self._live[self._segment] += len(places)
        self._delete_empty(touched)
        ledger.dirty.clear()
        self._fresh.clear()
        self._gone.clear()
        self._meta_saved = meta

    def _delete_empty(self, segments: Iterable[int]) -> None:
        for segment in segments:
            if self._live[segment] <= 0 and segment != self._segment:
                del self._live[segment]
                if segment in self._readers:
                    os.close(self._readers.pop(segment))
                self._path(segment).unlink(missing_ok=True)

    def close(self) -> None:
        self._db.close()
        for descriptor in [self._writer, *self._readers.values()]:
            if descriptor >= 0:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """A new file's name is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _row(group: Group) -> tuple[Any, ...]:
    return (
        group.key.epoch,
        group.key.index,
        group.position,
        int(group.state),
        group.lease,
        group.failures,
        group.actor,
        group.era,
        group.oldest,
        group.newest,
        group.step,
        group.reward,
        group.tokens,
    )


def _pack(value: Any) -> bytes:
    return msgpack.packb(value, use_bin_type=True)


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    written = os.writev(descriptor, buffers)
    left = b"".join(buffers)[written:] if written < sum(len(b) for b in buffers) else b""
    while left:
        left = left[os.write(descriptor, left) :]
