"""Whoever reads a small file while it is written finds all of one content."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from common.files import replace_json


@pytest.mark.parametrize("durable", [False, True])
def test_a_reader_never_sees_a_part(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "state.json"
    replace_json(path, ["x" * 100_000])
    done = threading.Event()

    def write() -> None:
        for count in range(1, 30):
            replace_json(path, ["y" * 100_000] * count, durable=durable)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert len(json.loads(path.read_text())[0]) == 100_000
    thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_what_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    replace_json(path, 1)
    with pytest.raises(TypeError):
        replace_json(path, object())
    assert json.loads(path.read_text()) == 1
