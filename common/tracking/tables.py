"""What a run leaves in MLflow besides metrics: sample responses, evaluations and events, as files of the run.

Invariant: each file is made anew from the spool and replaced whole, so that an upload that is repeated, or that
starts again in another process, changes nothing.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from common.tracking.spool import Record

ROWS_KEPT = 400  # newest rows of a table, newest lines of the events
Row = dict[str, Any]


class Tables:
    """Rows by file, and which files have changed since they were last uploaded."""

    def __init__(self) -> None:
        self._rows: dict[str, deque[Row]] = {}
        self._events: deque[str] = deque(maxlen=ROWS_KEPT)
        self._changed: set[str] = set()

    def add(self, record: Record) -> None:
        """Take in a record; most kinds concern no table."""
        if record.kind == "samples":
            for row in record.values.get("rows") or ():
                self._append("samples.json", {"step": record.step, **row})
        elif record.kind == "eval":
            for row in _evaluation_rows(record):
                self._append("evaluations.json", row)
        elif record.kind == "event":
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
            mark = " !" if record.values.get("warning") else ""
            self._events.append(f"{when} step {record.step}{mark} {record.values.get('text', '')}")
            self._changed.add("events.txt")

    def _append(self, name: str, row: Row) -> None:
        self._rows.setdefault(name, deque(maxlen=ROWS_KEPT)).append(row)
        self._changed.add(name)

    def changed(self) -> dict[str, str]:
        """Files to upload: name to content."""
        return {name: self._content(name) for name in sorted(self._changed)}

    def uploaded(self, name: str) -> None:
        """MLflow has this file as it is now."""
        self._changed.discard(name)

    def _content(self, name: str) -> str:
        if name == "events.txt":
            return "".join(f"{line}\n" for line in self._events)
        rows = self._rows[name]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # pandas' `split` orientation: what MLflow shows as a table
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        return json.dumps({"columns": columns, "data": data}, ensure_ascii=False)


def is_table(name: str) -> bool:
    """Whether MLflow can show the file as a table."""
    return name.endswith(".json")


def _evaluation_rows(record: Record) -> list[Row]:
    """One row for all sets together and one per set (keys `SET/name` of the record)."""
    by_set: dict[str, Row] = {}
    for key, value in record.values.items():
        name, slash, metric = key.rpartition("/")
        by_set.setdefault(name if slash else "all", {})[metric] = value
    return [{"version": record.step, "set": name, **row} for name, row in by_set.items()]


def _cell(value: Any) -> Any:
    plain = value is None or isinstance(value, str | int | float | bool)
    return value if plain else json.dumps(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
