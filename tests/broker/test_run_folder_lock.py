"""A lock that is held and a file system without locks are told apart."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from broker import run_folder
from broker.run_folder import Claim, is_served
from common.errors import UserError


def test_a_folder_that_is_served(tmp_path: Path) -> None:
    claim = Claim(tmp_path, resume=False)
    try:
        with pytest.raises(UserError, match=r"^run\.name: another broker is serving"):
            Claim(tmp_path, resume=True)
    finally:
        claim.release()


def test_who_only_asks_keeps_no_broker_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes the lock for an instant, together with others who ask."""
    monkeypatch.setattr(run_folder, "PROBE_S", 60.0)
    Claim(tmp_path, resume=True).release()
    asking = os.open(tmp_path / "broker.lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert not is_served(tmp_path)
    threading.Timer(0.1, os.close, (asking,)).start()
    claim = Claim(tmp_path, resume=True)
    assert is_served(tmp_path)
    claim.release()
    assert not is_served(tmp_path)
    assert not is_served(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        UserError, match=r"^run\.root: the file system of .* does not lock files \(flock: "
    ) as seen:
        Claim(tmp_path, resume=True)
    assert os.strerror(number) in str(seen.value)
