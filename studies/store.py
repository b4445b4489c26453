"""The rows of a study on disk: `rows.jsonl`, one JSON object per line.

Invariant: a unit's rows are there as a whole or not at all, whatever moment the process died; rows of different
settings never share a file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from studies.verdict import Row

ROWS = "rows.jsonl"
SETTINGS = "settings.json"
_END = "_unit_seconds"  # key of the line that closes a unit


class RowStore:
    """The rows of one study under one setting.

    Args:
        folder: made when absent.
        settings: JSON values that rows depend on; another run with others is refused.
        fresh: remove what is there.

    Raises:
        UserError: the folder holds rows of other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = folder / ROWS
        try:
            if fresh and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            _agree(folder / SETTINGS, json.loads(json.dumps(settings)))
            self.seconds, self.rows = self._read()
            self._rewrite()
        except OSError as error:
            raise UserError(f"cannot write '{folder}': {error.strerror}", setting="--out") from error

    def has(self, unit: str) -> bool:
        """The unit's rows are complete."""
        return unit in self.seconds

    def add(self, unit: str, rows: Iterable[Row], seconds: float) -> None:
        """Keep a finished unit; `seconds` is what it took."""
        named = [{"unit": unit, **row} for row in rows]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in named)
            file.write(json.dumps({"unit": unit, _END: round(seconds, 2)}) + "\n")
        self.rows += named
        self.seconds[unit] = seconds

    def _read(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Seconds of the finished units, and their rows."""
        seconds: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that a crash cut short
                    continue
                if _END in row:
                    seconds[row["unit"]] = row[_END]
                else:
                    rows.append(row)
        return seconds, [row for row in rows if row["unit"] in seconds]

    def _rewrite(self) -> None:
        """Drop the rows of units that a crash cut short."""
        temporary = self._path.with_suffix(".tmp")
        ends = [{"unit": unit, _END: seconds} for unit, seconds in self.seconds.items()]
        temporary.write_text("".join(json.dumps(row) + "\n" for row in (*self.rows, *ends)), encoding="utf-8")
        temporary.replace(self._path)


def _agree(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted({**there, **settings}):
        if there.get(name) != settings.get(name):
            raise UserError(
                f"'{path.parent}' holds rows with {name} = {there.get(name)!r}, not {settings.get(name)!r}: "
                "choose another folder, or begin again with --fresh",
                setting="--out",
            )
