"""A run that was just cancelled may be sent again: its broker takes seconds to leave."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from broker.run_folder import is_served
from common.run_files import LOCK_FILE
from deploy.slurm import submit


def held(folder: Path) -> int:
    """A lock as a serving broker holds it."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def test_a_broker_that_leaves_is_waited_for(tmp_path: Path) -> None:
    lock = held(tmp_path)
    threading.Timer(0.3, os.close, args=(lock,)).start()
    submit._wait_until_left(tmp_path)
    assert not is_served(tmp_path)


def test_one_that_stays_is_left_to_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LEAVE_S", 0.2)
    lock = held(tmp_path)
    submit._wait_until_left(tmp_path)
    assert is_served(tmp_path)
    os.close(lock)
