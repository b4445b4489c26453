"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object], what: str = "it", seconds: float = 120.0, every: float = 0.02
) -> None:
    """Wait for a condition, asked for `every` so many seconds; its never coming true fails the test.

    The time is generous: no test measures by it.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never so in {seconds:g} s: {what}"
        time.sleep(every)
