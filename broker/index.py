"""What the journal keeps in SQLite (WAL): the state of every group, where each published group lies, counters.

Invariant: `save` makes a `Change` durable as one transaction, whole or not at all; after it a restart reads exactly
what all saves so far add up to.

A save appends its change as one row of the table `changes`; every `FOLD_ROWS` rows the changes are folded into the
tables `groups` and `entries`. A group changes four times in its life, and its row lies in a page of its own: writing
tables at once would write four pages of 4 KiB per group, where an appended change takes some hundred bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import msgspec

from broker.group import Group, Rules, State
from broker.ledger import Ledger
from broker.segments import Place
from common.errors import UserError
from common.messages import GroupId

FORMAT = 3
FOLD_ROWS = 8192
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    epoch INTEGER, idx INTEGER, position INTEGER, state INTEGER, lease INTEGER, failures INTEGER, actor TEXT,
    era INTEGER, oldest INTEGER, newest INTEGER, step INTEGER, reward REAL, tokens INTEGER,
    PRIMARY KEY (epoch, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    epoch INTEGER, idx INTEGER, segment INTEGER, start INTEGER, frame INTEGER, a INTEGER, b INTEGER, c INTEGER,
    crc INTEGER,
    PRIMARY KEY (epoch, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changes (number INTEGER PRIMARY KEY, change BLOB);
CREATE TABLE IF NOT EXISTS results (number INTEGER PRIMARY KEY, result BLOB);
"""


class Change(msgspec.Struct, array_like=True):
    """What one save changes.

    Attributes:
        ledger: the ledger's counters (`Books.meta`), packed.
        groups: rows of the table `groups`.
        entries: where groups lie now: (epoch, index, segment, start, four sizes, checksum).
        gone: groups whose entry is deleted.
    """

    ledger: bytes
    groups: list[tuple[int | float | str, ...]]
    entries: list[tuple[int, ...]]
    gone: list[GroupId]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Change).decode


def group_row(group: Group) -> tuple[int | float | str, ...]:
    """A group as a row of the table `groups`."""
    return (
        *group.key,
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


class Index:
    """The database file of a journal.

    Args:
        path: made if absent.
        fsync: wait for the disk at each save.
        read_only: open an existing file and change nothing.
    """

    def __init__(self, path: Path, *, fsync: bool = False, read_only: bool = False) -> None:
        self.path = path
        self._db = _open_read_only(path) if read_only else _open(path, fsync)
        # What the tables do not have yet; an entry that is None shall be deleted.
        self._groups: dict[GroupId, tuple[Any, ...]] = {}
        self._entries: dict[GroupId, tuple[int, ...] | None] = {}
        self._unfolded = 0
        self._ledger: bytes | None = None
        self._read_changes()

    def _read_changes(self) -> None:
        identity = self.meta("identity")
        if identity is not None and identity["format"] != FORMAT:
            raise UserError(
                f"the journal in '{self.path.parent}' has format {identity['format']}; this software reads {FORMAT}."
            )
        for (packed,) in self._db.execute("SELECT change FROM changes ORDER BY number"):
            self._note(_decode(packed))

    def _note(self, change: Change) -> None:
        """A change is in the table `changes`."""
        self._groups.update((_key(row), row) for row in change.groups)
        self._entries.update((_key(row), row) for row in change.entries)
        self._entries.update(dict.fromkeys(change.gone))
        self._unfolded += len(change.groups) + len(change.entries) + len(change.gone)
        self._ledger = change.ledger

    # --- reading -------------------------------------------------------------------------------------------

    def meta(self, name: str) -> Any:
        """A saved value, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return _unpack(row[0]) if row else None

    def identify(self, identity: dict[str, Any]) -> None:
        """Bind the journal to its run, or check that it is bound to this one; see `Journal.identify`."""
        known = self.meta("identity")
        if known is None:
            packed = pack({"format": FORMAT, **identity})
            self._db.execute("INSERT INTO meta VALUES ('identity', ?)", (packed,))
            return
        for setting, value in identity.items():
            if known.get(setting) != value:
                raise UserError(
                    f"it was {known.get(setting)!r} when the run in '{self.path.parents[1]}' began and is {value!r} "
                    "now; it may not change within a run.",
                    setting=setting,
                )

    def ledger(self, rules: Rules) -> Ledger | None:
        """The ledger as it was saved, or None in a new journal."""
        counters = self.meta("ledger") if self._ledger is None else _unpack(self._ledger)
        if counters is None:
            return None
        rows = {_key(row): row for row in self._db.execute("SELECT * FROM groups")}
        groups = (Group(key, row[2], State(row[3]), *row[4:]) for key, row in (rows | self._groups).items())
        return Ledger.restore(rules, counters, groups)

    def places(self) -> Iterator[tuple[GroupId, Place]]:
        """Where every group lies that is kept."""
        rows: dict[GroupId, tuple[int, ...] | None]
        rows = {_key(row): row for row in self._db.execute("SELECT * FROM entries")}
        for key, row in (rows | self._entries).items():
            if row is not None:
                yield key, Place(row[2], row[3], tuple(row[4:8]), row[8])

    def results(self) -> dict[int, Any]:
        """The results of evaluations, by number."""
        found = self._db.execute("SELECT number, result FROM results ORDER BY number")
        return {number: _unpack(result) for number, result in found}

    # --- saving --------------------------------------------------------------------------------------------

    def save(self, change: Change, extra: bytes | None, results: Mapping[int, Any]) -> None:
        """Make a change durable, and with it what else the run keeps where that has changed.

        A result of an evaluation is a row of its own: the whole history at every save would grow with the run.

        Raises:
            sqlite3.Error: nothing was saved.
        """
        fold = self._unfolded >= FOLD_ROWS
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("INSERT INTO changes (change) VALUES (?)", (_encode(change),))
            if extra is not None:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('extra', ?)", (extra,))
            for number, result in results.items():
                self._save_result(number, result)
            if fold:
                self._fold(change)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._note(change)
        if fold:
            self._groups.clear()
            self._entries.clear()
            self._unfolded = 0

    def _save_result(self, number: int, result: Any) -> None:
        if result is None:
            self._db.execute("DELETE FROM results WHERE number = ?", (number,))
        else:
            self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (number, pack(result)))

    def _fold(self, last: Change) -> None:
        """Bring the tables up to date, `last` included, and empty `changes`."""
        groups = self._groups | {_key(row): row for row in last.groups}
        entries = self._entries | {_key(row): row for row in last.entries} | dict.fromkeys(last.gone)
        deleted = [key for key, row in entries.items() if row is None]
        kept = [row for row in entries.values() if row is not None]
        self._db.executemany(f"INSERT OR REPLACE INTO groups VALUES ({_marks(13)})", groups.values())
        self._db.executemany("DELETE FROM entries WHERE epoch = ? AND idx = ?", deleted)
        self._db.executemany(f"INSERT OR REPLACE INTO entries VALUES ({_marks(9)})", kept)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('ledger', ?)", (last.ledger,))
        self._db.execute("DELETE FROM changes")

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _open_read_only(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{path}?mode=ro", isolation_level=None, uri=True)
    db.execute("BEGIN")  # one snapshot for all reads, even if a broker writes on
    return db


def _open(path: Path, fsync: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA wal_autocheckpoint = 8192")
    db.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
    db.executescript(SCHEMA)
    return db


def _key(row: tuple[Any, ...]) -> GroupId:
    return GroupId(*row[:2])


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def pack(value: Any) -> bytes:
    """Plain values as they are kept."""
    return msgpack.packb(value, use_bin_type=True)


def _unpack(packed: bytes) -> Any:
    return msgpack.unpackb(packed, raw=False, strict_map_key=False)
