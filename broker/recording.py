"""A recorded run, served again: the same batches in the same order, from the journal alone.

Invariant: the surviving history of the recorded run is replayed exactly, step by step, whatever the learner does
with it; the recording is never written. The learner needs nothing special: it takes, fetches and commits as ever,
and starts from version 0 as the recorded run did (`slipstream learner --replay runs/NAME`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.group import Group, LedgerError, Rules, State
from broker.journal import Journal
from broker.ledger import Ledger
from broker.store import NOTHING, Entry
from common.errors import UserError
from common.messages import GroupId
from common.run_files import JOURNAL_FOLDER, LEDGER_FILE


class RecordedStore:
    """The groups of a recording, read only; see `broker.store.Store`."""

    bytes_held = 0

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def put(self, key: GroupId, entry: Entry) -> None:
        """Nothing is published in a replay."""

    def get(self, key: GroupId) -> Entry | None:
        """A group as it was published."""
        return self._journal.get(key)

    def kept(self, key: GroupId) -> bool:
        """A recording keeps everything."""
        return True

    def consumed(self, keys: Iterable[GroupId]) -> None:
        """A recording keeps everything."""

    def pin(self, step: int, ledger: Ledger) -> None:
        """A recording keeps everything."""

    def save(
        self,
        ledger: Ledger,
        extra: Callable[[], dict[str, Any]] | None,
        results: Mapping[int, Any] = NOTHING,
    ) -> None:
        """Where the replay stands is not kept: it can be repeated."""
        ledger.dirty.clear()
        ledger.discarded.clear()

    def results(self) -> dict[int, Any]:
        """A replay evaluates nothing."""
        return {}

    def close(self) -> None:
        """Close the recording."""
        self._journal.close()


class RecordedLedger(Ledger):
    """A ledger whose steps are written down: nothing is leased, nothing expires."""

    def __init__(self, rules: Rules, steps: Sequence[Sequence[Group]]) -> None:
        super().__init__(rules)
        self._script = [[group.key for group in groups] for groups in steps]
        for group in (group for groups in steps for group in groups):
            filtered = group.state == State.FILTERED
            self._enter(replace(group, state=State.FILTERED if filtered else State.BUFFERED, step=-1))
            self.granted += 1

    @property
    def last_step(self) -> int:
        """Last recorded step."""
        return len(self._script) - 1

    def room(self, version: int) -> int:
        """None: a replay needs no actor."""
        return 0

    def sweep(self) -> list[GroupId]:
        """Nothing is too old: it was trained on."""
        return []

    def lose(self, keys: Iterable[GroupId]) -> None:
        """Nobody would sample it again. Raises LedgerError."""
        raise LedgerError("conflict", f"the recording is damaged: {', '.join(map(str, keys))} cannot be read")

    def _choose(self) -> list[Group] | None:
        if self.next_step > self.last_step:
            return None
        return [self.groups[key] for key in self._script[self.next_step]]

    def _drop_rewound(self) -> int:
        return 0  # versions are those of the recorded run, whatever this one has reached


def open_recording(folder: Path, rules: Rules) -> tuple[RecordedLedger, RecordedStore]:
    """The recording in a run folder.

    Raises:
        UserError: the folder has no journal, no trained step, or its payloads were not kept.
    """
    if not (folder / JOURNAL_FOLDER / LEDGER_FILE).exists():
        raise UserError(f"'{folder}' holds no journal to replay.", setting="--replay")
    try:
        journal = Journal(folder / JOURNAL_FOLDER, read_only=True)
        recorded = journal.load(rules)
    except sqlite3.Error as error:
        raise UserError(f"the journal in '{folder}' cannot be read: {error}.", setting="--replay") from None
    steps = _steps(recorded) if recorded is not None else []
    if not steps:
        raise UserError(f"'{folder}' holds no trained step to replay.", setting="--replay")
    trained = [group for groups in steps for group in groups if group.state == State.CONSUMED]
    if not all(journal.kept(group.key) for group in trained):
        raise UserError(
            f"the run in '{folder}' did not keep what it trained on: record one with broker.record = true.",
            setting="--replay",
        )
    return RecordedLedger(rules, steps), RecordedStore(journal)


def _steps(recorded: Ledger) -> list[list[Group]]:
    steps: list[list[Group]] = [[] for _ in range(recorded.step)]
    for group in recorded.groups.values():
        if group.state in (State.CONSUMED, State.FILTERED) and 0 <= group.step < recorded.step:
            steps[group.step].append(group)
    return [sorted(groups, key=lambda group: group.order) for groups in steps]
