"""What a worker tells systemd: that it has started, and that it still makes progress.

Invariant: outside systemd (no NOTIFY_SOCKET) everything here does nothing and costs nothing; inside, a worker
that no longer makes progress falls silent, and systemd kills and restarts it (sd_notify(3), sd_watchdog_enabled(3)).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from sdnotify import SystemdNotifier

PINGS_PER_INTERVAL = 4  # systemd advises at least two; a late ping or two must not cost a worker its life


def _notify(state: str) -> None:
    if os.environ.get("NOTIFY_SOCKET"):
        SystemdNotifier().notify(state)


def notify_ready(status: str = "") -> None:
    """Say that start-up is over: systemd now starts what waits for this unit. `status` is one line for people."""
    _notify("READY=1" + (f"\nSTATUS={status}" if status else ""))


def watchdog_interval_s() -> float | None:
    """Seconds after which systemd takes a silent unit for dead (WATCHDOG_USEC); None: no watchdog is set.

    WATCHDOG_PID is not asked: a learner's rank 0 may be a child of the unit's main process, and the unit's
    NotifyAccess= already says whose pings count.
    """
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 and os.environ.get("NOTIFY_SOCKET") else None


class Progress:
    """Whether something has changed within the last `limit_s` seconds, or had a reason not to."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._mark: object = None
        self._since = time.monotonic()

    def note(self, mark: object, *, waiting: bool = False) -> None:
        """What the worker has got to; `waiting` when it waits for somebody and cannot go on by itself."""
        if waiting or mark != self._mark:
            self._mark, self._since = mark, time.monotonic()

    def __call__(self) -> bool:
        return time.monotonic() - self._since < self._limit_s


class Watchdog:
    """Pings systemd's watchdog, but only while the worker makes progress.

    Call `beat` from the worker's own loop (its heartbeat); where the main loop blocks for long on purpose, such
    as a learner in a collective, `run` beats from a thread, and `alive` alone decides.

    Args:
        alive: says whether the worker makes progress, or waits for a reason; must return at once.
    """

    def __init__(self, alive: Callable[[], bool] = lambda: True) -> None:
        interval = watchdog_interval_s()
        self._alive = alive
        self._every_s = interval / PINGS_PER_INTERVAL if interval else None
        self._last = float("-inf")
        self._stopped = threading.Event()

    def beat(self) -> bool:
        """Ping when one is due and the worker is alive; returns whether a ping was sent."""
        if self._every_s is None or time.monotonic() - self._last < self._every_s or not self._alive():
            return False
        self._last = time.monotonic()
        _notify("WATCHDOG=1")
        return True

    def run(self) -> None:
        """Beat from a daemon thread until `stop`; does nothing without a watchdog."""
        if self._every_s is not None:
            threading.Thread(target=self._loop, name="systemd-watchdog", daemon=True).start()

    def _loop(self) -> None:
        # Half the period, so that a ping is never late by more than half of one.
        while not self._stopped.wait((self._every_s or 1.0) / 2):
            self.beat()

    def stop(self) -> None:
        """End the thread of `run`."""
        self._stopped.set()
