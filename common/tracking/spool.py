"""The spool: every point of a run as one line of JSON, on disk before anything else sees it.

Invariant: lines are only ever appended, whole, by one writer. A reader that remembers its byte offset can
stop, crash or be away for hours and loses nothing: this is how a run outlives an outage of its MLflow server.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

END_ATTEMPTS, END_RETRY_S = 30, 1.0  # without its end a run would count as running for ever


class Record(NamedTuple):
    """A point: `kind` (a group of the catalogue, or samples, event, run, end), step, and its values."""

    offset: int
    time: float
    kind: str
    step: int
    values: dict[str, Any]


class Spool:
    """The writing end. Appending never raises for a full disk: points are dropped and counted instead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._broken = False  # the last line may be half written
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_broken_line(path)

    def append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one point; values that JSON cannot hold (NaN, infinities) become null.

        The last point of a run, `end`, waits for space: up to `END_ATTEMPTS` x `END_RETRY_S` seconds.
        """
        line = json.dumps(
            {"time": time.time(), "kind": kind, "step": step, "values": _finite(values)}, ensure_ascii=False
        )
        attempts = END_ATTEMPTS if kind == "end" else 1
        while not self._write(line):
            attempts -= 1
            if not attempts:
                self.dropped += 1
                return
            time.sleep(END_RETRY_S)

    def _write(self, line: str) -> bool:
        start = "\n" if self._broken else ""  # ends the half line, so that it spoils no later point
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{start}{line}\n")
        except OSError:
            self._broken = True
            return False
        self._broken = False
        return True


def read_spool(path: Path, offset: int = 0) -> Iterator[Record]:
    """Complete lines from a byte offset on; a line still being written is left for the next time.

    Yields records whose `offset` is where the next reading starts. Lines that are not points are skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                point = json.loads(line)
                yield Record(offset, point["time"], point["kind"], int(point["step"]), point["values"])
            except (ValueError, KeyError, TypeError):
                continue


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _end_broken_line(path: Path) -> None:
    """A crash may have left half a line: end it, so that it spoils no later point."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
