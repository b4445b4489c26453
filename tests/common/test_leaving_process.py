"""Processes that end when they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from common.process import STOPS, StopSignal


@pytest.mark.parametrize("how", ["a pipe that nobody reads", "closed"])
def test_output_that_goes_nowhere_does_not_change_how_a_process_ends(how: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from common.process import leave; print('something'); "
    code += "sys.stdout.close(); " if how == "closed" else ""
    to = writing if how != "closed" else subprocess.DEVNULL
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, "-c", code + "leave(7)"], stdout=to, env=buffered, check=False)
    os.close(writing)
    assert ended.returncode == 7


def test_stop_signals_are_counted_and_end_nothing_by_themselves() -> None:
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        stop = StopSignal()
        assert (stop.count, stop.is_set()) == (0, False)
        for number in STOPS:
            signal.raise_signal(number)
        assert (stop.count, stop.is_set()) == (2, True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
