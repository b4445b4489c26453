"""What runs inside a worker process of the pool.

Invariant: everything slow to import is imported before the first task, so the deadline only counts verification; and a
worker never outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .grade import Level, any_match
from .rewards import RewardFunction, apply_reward, load_reward
from .verdict import Verdict, correct, unverified, wrong

_PR_SET_PDEATHSIG = 1
_reward: RewardFunction | None = None
_reward_error: str | None = None


def start(parent: int, level: Level, reward: str | None) -> None:
    """Initialises a worker: ties its life to the parent's, imports the libraries, loads the reward function."""
    global _reward, _reward_error
    _die_with(parent)
    if level == "full":
        from .full import _library

        _library()
    if reward is not None:
        try:
            _reward = load_reward(reward)
        except Exception as error:
            _reward_error = str(error)
    any_match(("\\sqrt{2}",), ("1",), level)  # fills the tables and precision contexts


def _die_with(parent: int) -> None:
    """SIGKILL when the parent dies: by the kernel on Linux, and by a watching thread anywhere."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux the thread does it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def grade_answer(answers: tuple[str, ...], golds: tuple[str, ...], level: Level) -> Verdict:
    """Grades extracted answers (the first is the answer, the rest its other readings)."""
    started = time.perf_counter()
    matched = any_match(answers, golds, level)
    verdict = wrong(answers[0]) if matched is None else correct(matched)
    return replace(verdict, seconds=time.perf_counter() - started)


def run_reward(response: str, question: Mapping[str, Any]) -> Verdict:
    """Runs the custom reward function."""
    if _reward is None:
        return unverified(_reward_error or "no reward function is loaded")
    started = time.perf_counter()
    verdict = apply_reward(_reward, response, question)
    return replace(verdict, seconds=time.perf_counter() - started)
