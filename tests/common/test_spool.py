"""Points are on disk first, whole lines only, and a reader that knows its offset loses none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tracking.spool import Spool, read_spool


def test_points_come_back_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "m.jsonl")
    for step in range(5):
        spool.append("learner", step, {"loss": step / 2, "bad": math.nan, "list": [math.inf, 1.0]})
    records = list(read_spool(spool.path))
    assert [r.step for r in records] == list(range(5))
    assert records[3].values == {"loss": 1.5, "bad": None, "list": [None, 1.0]}
    assert list(read_spool(spool.path, records[2].offset)) == records[3:]


@given(cut=st.integers(1, 60))
def test_half_a_line_left_by_a_crash_spoils_nothing(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("spool") / "m.jsonl"
    spool = Spool(path)
    spool.append("learner", 0, {"a": 1.0})
    whole = path.read_bytes()
    spool.append("learner", 1, {"a": 2.0})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    before = list(read_spool(path))
    Spool(path).append("learner", 2, {"a": 3.0})
    after = list(read_spool(path))
    assert before[0].step == 0
    assert [r.step for r in after if r.step != 1] == [0, 2]


def test_a_line_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = json.dumps({"time": 1.0, "kind": "learner", "step": 0, "values": {}})
    path.write_text(line)
    assert list(read_spool(path)) == []
    path.write_text(line + "\n")
    assert len(list(read_spool(path))) == 1


class FullDisk:
    """A file object whose first writes are cut in half by a full disk."""

    def __init__(self, path: Path, failures: int) -> None:
        self.path, self.failures, self._open = path, failures, Path.open

    def open(self, mode: str, encoding: str):
        if self.failures:
            self.failures -= 1
            line = json.dumps({"time": 1.0, "kind": "learner", "step": 0, "values": {}})
            with self._open(self.path, "a") as file:
                file.write(line[: len(line) // 2])
            raise OSError(28, "No space left on device")
        return self._open(self.path, mode, encoding=encoding)


def test_half_a_line_left_by_a_full_disk_spoils_no_later_point(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "m.jsonl")
    spool.append("learner", 0, {})
    spool.path = FullDisk(tmp_path / "m.jsonl", 1)
    for step in (1, 2, 3):
        spool.append("learner", step, {})
    assert spool.dropped == 1
    assert [record.step for record in read_spool(tmp_path / "m.jsonl")] == [0, 2, 3]


def test_the_end_waits_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.tracking.spool.END_RETRY_S", 0.001)
    spool = Spool(tmp_path / "m.jsonl")
    spool.path = FullDisk(tmp_path / "m.jsonl", 5)
    spool.append("end", 1, {"status": "finished"})
    assert [record.kind for record in read_spool(tmp_path / "m.jsonl")] == ["end"]
    assert spool.dropped == 0


def test_a_full_disk_drops_points_and_counts_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "m.jsonl")
    spool.path = tmp_path  # a folder cannot be appended to
    spool.append("learner", 0, {})
    assert spool.dropped == 1
