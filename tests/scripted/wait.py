"""Waiting for what other threads and processes do.

Invariant: who waits asks for a condition and is generous with time; nothing here is a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


def until(
    condition: Callable[[], object],
    what: str | Callable[[], str] = "it",
    seconds: float = 120.0,
    every: float = 0.02,
) -> None:
    """Wait for a condition, asked for `every` so many seconds; its never coming true fails the test.

    The time is generous: no test measures by it. A condition may itself fail the test, where something has happened
    after which it can never come true.

    Args:
        condition: asked again and again.
        what: it says, for people; a function where that is only known in the end (the tail of a log).
        seconds: to wait at most.
        every: pause between two looks, in seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"never so in {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every)


def alive(pids: Iterable[int]) -> set[int]:
    """Those of `pids` that still run (a zombie does not)."""
    import psutil

    running = set()
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.add(pid)
        except psutil.NoSuchProcess:
            continue
    return running
