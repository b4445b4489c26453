"""The broker's claim on its run folder: one lock, one address file.

Invariant: at most one broker serves a folder (the kernel's file lock goes with the process, however it ends), and
`broker.json` names a broker that is bound and answering, or one that was killed; never one that is still starting.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_json
from common.run_files import ADDRESS_FILE, JOURNAL_FOLDER, LOCK_FILE, SPOOL

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # how `flock` says that another process has the lock
PROBE_S = 0.5  # for so long a claim waits for somebody who only asks whether the folder is served


class Claim:
    """Holds the lock of a run folder until `release`.

    Raises:
        UserError: another broker holds it, or the folder cannot be written or locked; or it holds a run and
            `resume` is False.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="run.root") from None
        try:
            _take(self._lock)
        except OSError as error:
            os.close(self._lock)
            raise _not_locked(folder, error) from None
        if not resume and was_served(folder):
            os.close(self._lock)
            raise UserError(
                f"'{folder}' already holds a run: continue it with --resume or choose another name.",
                setting="run.name",
            )
        (folder / ADDRESS_FILE).unlink(missing_ok=True)

    def announce(self, **facts: Any) -> None:
        """Write `broker.json` atomically: where this broker is."""
        replace_json(self.folder / ADDRESS_FILE, {**facts, "pid": os.getpid(), "started": time.time()})

    def release(self) -> None:
        """Give the folder free. The address goes first: nobody shall wait at a door behind which nobody is."""
        (self.folder / ADDRESS_FILE).unlink(missing_ok=True)
        os.close(self._lock)


def _take(lock: int) -> None:
    deadline = time.monotonic() + PROBE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in HELD or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def is_served(folder: Path) -> bool:
    """Whether a broker holds the folder now; touches nothing."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD  # else the file system has no locks, which its broker will say
    finally:
        os.close(lock)
    return False


def _not_locked(folder: Path, error: OSError) -> UserError:
    """What a refused lock means: somebody holds it, or the file system has none (Lustre without `-o flock`)."""
    if error.errno in HELD:
        return UserError(f"another broker is serving '{folder}'.", setting="run.name")
    return UserError(f"the file system of '{folder}' {no_flock(error)}", setting="run.root")


def no_flock(error: OSError) -> str:
    """The end of a sentence about a file system that refuses `flock` for another reason than that it is held."""
    return f"does not lock files (flock: {error.strerror}): mount it with flock, or choose another folder."


def was_served(folder: Path) -> bool:
    """Whether a broker has written to the folder before."""
    return (folder / SPOOL).exists() or (folder / JOURNAL_FOLDER).exists()
