"""Processes that end when they should, and that hear when they are told to.

Invariant: no process of a run outlives what started it: children are told to die with their parent, and a
process group that does not leave in time is killed whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
STOPS = (signal.SIGTERM, signal.SIGINT)
# "2,3": where an actor's engine runs, if not with the actor.
ENGINE_CORES_VARIABLE = "SLIPSTREAM_ENGINE_CORES"


class StopSignal:
    """Counts SIGTERM and SIGINT from now on, in place of what they do by default; `is_set` as a threading.Event's.

    Only the main thread may make one. Nothing is locked and nothing is woken: whoever waits looks now and then.
    """

    def __init__(self) -> None:
        self.count = 0
        for number in STOPS:
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.count += 1

    def is_set(self) -> bool:
        """Whether one has come."""
        return self.count > 0


def die_with_parent(sig: int = signal.SIGKILL) -> None:
    """Ask Linux to signal this process when the thread that started it dies; call it first in the child."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)


def use_cores(cores: Iterable[int] | None) -> None:
    """Keep this process and its children to the given cores; None leaves it alone."""
    if cores is not None:
        os.sched_setaffinity(0, set(cores))


def signal_group(process: subprocess.Popen, sig: int) -> None:
    """Signal a child that leads its own session, and everything in it; gone already is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, sig)


def wait_for(processes: Iterable[subprocess.Popen], seconds: float) -> list[subprocess.Popen]:
    """Wait until all have ended or the time is up; returns those still running."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if process.poll() is None]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if process.poll() is None]
    return left


def end_groups(processes: Iterable[subprocess.Popen], *, term_s: float) -> None:
    """SIGTERM to each group, SIGKILL to what is left after `term_s` seconds; returns when all are gone."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            signal_group(process, signal.SIGTERM)
    wait_for(processes, term_s)
    for process in processes:
        signal_group(process, signal.SIGKILL)  # also what a leader that has left may have left behind
    wait_for(processes, 2.0)


def leave(code: int) -> NoReturn:
    """End the process at once: C++ threads of torch and vLLM may abort, or chatter in, an orderly interpreter exit."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # A full disk, a pipe that nobody reads, closed already.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
