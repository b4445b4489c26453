"""The journal, case by case; that it equals the ledger after any history is in test_ledger_model."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.group import Facts, Group, Rules, State
from broker.journal import Journal
from broker.ledger import Ledger
from broker.store import Entry, StoreFull
from common.errors import UserError

RULES = Rules(questions=50, groups_per_step=2, steps=20, max_staleness=1)
PAYLOAD = [b"prompt--", b"ids-" * 500, b"prob" * 500]


def fill(ledger: Ledger, journal: Journal, count: int) -> list[Group]:
    groups = ledger.lease("a", count, era=ledger.era, version=ledger.version, now=0.0)
    for group in groups:
        publish(ledger, journal, group)
    return groups


def publish(ledger: Ledger, journal: Journal, group: Group) -> None:
    facts = Facts(group.key, group.lease, "a", group.era, group.oldest, group.newest, 0.5, 10, False)
    assert ledger.publish(facts).status == "accepted"
    journal.put(group.key, Entry(repr(group.key).encode(), PAYLOAD))


def train(ledger: Ledger, journal: Journal) -> None:
    groups = ledger.take(ledger.step)
    journal.save(ledger, None)
    ledger.commit(ledger.step, ledger.step + 1)
    journal.consumed(group.key for group in groups)
    journal.save(ledger, None)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("payload-*.bin"))


@pytest.mark.parametrize("fsync", [False, True])
def test_what_was_saved_is_there_after_a_restart(tmp_path: Path, fsync: bool) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path, fsync=fsync)
    groups = fill(ledger, journal, 4)
    journal.save(ledger, lambda: {"note": 7})
    again = Journal(tmp_path)
    assert again.load(RULES).groups == ledger.groups
    assert again.meta("extra") == {"note": 7}
    entry = again.get(groups[0].key)
    assert entry.frame == repr(groups[0].key).encode()
    assert [bytes(part) for part in entry.payload] == PAYLOAD
    assert again.bytes_held == 0, "payloads stay on the disk until they are asked for"


def test_what_was_not_saved_leaves_no_trace(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    fill(ledger, journal, 2)
    journal.save(ledger, None)
    before = ledger.counts()
    late = fill(ledger, journal, 2)
    journal._segments.append(journal._fresh.values())  # the crash comes between payload and transaction
    again = Journal(tmp_path)
    restored = again.load(RULES)
    assert restored.counts() == before
    assert late[0].key not in restored.groups
    assert not again.kept(late[0].key)
    retried = restored.lease("a", 1, era=0, version=0, now=0.0)[0]
    assert retried.key == late[0].key
    publish(restored, again, retried)
    again.save(restored, None)
    assert [bytes(part) for part in Journal(tmp_path).get(retried.key).payload] == PAYLOAD


def test_trained_payloads_stay_until_the_checkpoint_is_pinned(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    first = fill(ledger, journal, 4)
    train(ledger, journal)
    trained = [group for group in first if group.state == State.CONSUMED]
    assert journal.bytes_held == sum(len(repr(g.key)) + sum(map(len, PAYLOAD)) for g in first[2:])
    assert all(journal.kept(group.key) for group in trained), "a rewind may ask for them"
    journal.pin(1, ledger)
    assert not any(journal.kept(group.key) for group in trained)
    journal.save(ledger, None)
    again = Journal(tmp_path)
    assert not any(again.kept(group.key) for group in trained)
    assert all(again.kept(group.key) for group in first[2:])


def test_a_recording_keeps_them(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path, record=True)
    first = fill(ledger, journal, 4)
    train(ledger, journal)
    journal.pin(1, ledger)
    journal.save(ledger, None)
    assert all(Journal(tmp_path).kept(group.key) for group in first)


def test_segments_that_hold_nothing_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.segments.SEGMENT_BYTES", 5000)
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    for _ in range(6):
        fill(ledger, journal, 2)
        train(ledger, journal)
    grown = segments(tmp_path)
    journal.pin(6, ledger)
    journal.save(ledger, None)
    assert len(grown) > 3
    assert len(segments(tmp_path)) < 3


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("what", ["payload", "index"])
def test_a_full_disk_costs_nothing_but_time(tmp_path: Path, what: str) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    groups = fill(ledger, journal, 2)
    journal.save(ledger, None)
    groups += fill(ledger, journal, 2)
    limit = 6000 if what == "payload" else os.path.getsize(tmp_path / "ledger.sqlite-wal")
    with files_no_larger_than(limit):
        for _ in range(2):
            with pytest.raises(StoreFull, match=str(tmp_path)):
                journal.save(ledger, None)
    assert journal.get(groups[3].key) is not None
    journal.save(ledger, None)
    again = Journal(tmp_path)
    assert again.load(RULES).groups == ledger.groups
    for group in groups:
        assert [bytes(part) for part in again.get(group.key).payload] == PAYLOAD


def test_a_segment_that_cannot_be_opened_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.segments.SEGMENT_BYTES", 1)
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    groups = fill(ledger, journal, 2)
    journal.save(ledger, None)
    groups += fill(ledger, journal, 2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(StoreFull, match="Too many open files"):
            journal.save(ledger, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    journal.save(ledger, None)
    again = Journal(tmp_path)
    for group in groups:
        assert [bytes(part) for part in again.get(group.key).payload] == PAYLOAD


def test_a_file_whose_groups_were_all_released_while_it_was_written_to_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    (first,) = fill(ledger, journal, 1)
    journal.save(ledger, None)
    (full,) = segments(tmp_path)
    ledger.discarded.append(first.key)
    journal.save(ledger, None)
    assert segments(tmp_path) == [full], "still the one that is written to"
    monkeypatch.setattr("broker.segments.SEGMENT_BYTES", 1)
    fill(ledger, journal, 1)
    journal.save(ledger, None)
    assert full not in segments(tmp_path)


def test_restarts_leave_no_empty_files(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    (group,) = fill(ledger, journal, 1)
    journal.save(ledger, None)
    journal.close()
    for _ in range(5):
        again = Journal(tmp_path)
        assert [bytes(part) for part in again.get(group.key).payload] == PAYLOAD
        again.close()
    assert len(segments(tmp_path)) == 2, "the one with the group, and that of the last start"


def test_few_files_are_open_however_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.segments.SEGMENT_BYTES", 1)
    monkeypatch.setattr("broker.segments.READERS_KEPT", 2)
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    groups = []
    for _ in range(4):
        groups += fill(ledger, journal, 1)
        journal.save(ledger, None)
    again = Journal(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for group in groups + groups[::-1]:
        assert [bytes(part) for part in again.get(group.key).payload] == PAYLOAD
    assert len(segments(tmp_path)) > 4
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_damaged_segment_is_an_error_and_not_wrong_data(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    groups = fill(ledger, journal, 2)
    journal.save(ledger, None)
    with segments(tmp_path)[0].open("r+b") as file:
        file.seek(5000)
        file.write(bytes(100))
    again = Journal(tmp_path)
    assert again.get(groups[0].key) is not None
    with pytest.raises(OSError, match="is damaged"):
        again.get(groups[1].key)


def test_groups_beyond_the_end_of_a_file_are_pending_again(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    groups = fill(ledger, journal, 2)
    journal.save(ledger, None)
    os.truncate(segments(tmp_path)[0], 5000)
    again = Journal(tmp_path)
    restored = again.load(RULES)
    assert [restored.groups[g.key].state for g in groups] == [State.BUFFERED, State.PENDING]
    assert [again.kept(g.key) for g in groups] == [True, False]
    assert restored.counts()["sum_ok"]
    assert restored.abandoned == {"damaged": 1}
    again.save(restored, None)
    assert Journal(tmp_path).load(RULES).groups == restored.groups, "once and for all"


def test_a_journal_belongs_to_its_run(tmp_path: Path) -> None:
    Journal(tmp_path).identify({"run.seed": 1})
    Journal(tmp_path).identify({"run.seed": 1})
    with pytest.raises(UserError, match=r"^run\.seed: it was 1 .* and is 2 now"):
        Journal(tmp_path).identify({"run.seed": 2})


def test_a_group_that_a_rewind_drops_takes_its_payload_with_it(tmp_path: Path) -> None:
    ledger, journal = Ledger(RULES), Journal(tmp_path)
    first = fill(ledger, journal, 4)
    train(ledger, journal)
    (later,) = fill(ledger, journal, 1)
    journal.save(ledger, None)
    ledger.rewind(0, 0, journal.kept)
    assert later.state == State.PENDING
    journal.save(ledger, None)
    again = Journal(tmp_path)
    assert not again.kept(later.key)
    assert all(again.kept(group.key) for group in first), (
        "their version lives on: trained again, not sampled again"
    )
    assert again.load(RULES).groups == ledger.groups
