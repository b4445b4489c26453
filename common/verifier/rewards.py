'''Custom reward functions: loaded by dotted path, run in the verifier's pool.

Invariant: whatever a reward function does (raise, hang, exit, return nonsense), the run goes on and the response is
`unverified` with the reason.

A reward function in ten lines; in the recipe it is `reward = "my_package.rewards:length_bonus"`:

    def length_bonus(response: str, question: dict) -> float | tuple[float, str]:
        """1 for the right number, 0.1 if the response at least ends on a number."""
        words = response.split()
        if not words or not words[-1].rstrip(".").isdigit():
            return 0.0, "unformatted"
        if int(words[-1].rstrip(".")) == int(question["answer"]):
            return 1.0
        return 0.1, "wrong"

`question` is the row of the question set. A bare number of 1 or more counts as `correct`, less as `wrong`; a pair
names its verdict. The module is imported once per worker, outside of the deadline.
'''

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import UserError
from .verdict import Outcome, Verdict, unverified

RewardFunction = Callable[[str, Mapping[str, Any]], float | tuple[float, str]]


def load_reward(path: str) -> RewardFunction:
    """The function at `package.module:function`, installed or in the working directory.

    Raises:
        UserError: the path is malformed, the module cannot be imported, or it has no such function.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"{path!r} is not of the form 'package.module:function'", setting="reward")
    try:
        with _working_directory():
            function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UserError(f"cannot load {path!r}: {type(error).__name__}: {error}", setting="reward") from error
    if not callable(function):
        raise UserError(f"{path!r} is not a function", setting="reward")
    return function


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Modules of the working directory can be imported, as long as a user's code does it.

    Not for longer: a `studies` or `deploy.py` there would stand before Slipstream's own.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(here)


def apply_reward(function: RewardFunction, response: str, question: Mapping[str, Any]) -> Verdict:
    """Calls the function and turns what it returns into a verdict; never raises an Exception."""
    try:
        with _working_directory():
            result = function(response, question)
    except Exception as error:
        return unverified(f"the reward function raised {type(error).__name__}: {error}")
    reward, named = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        return unverified(f"the reward function returned {result!r:.80}, not a finite number")
    if named is None:
        named = Outcome.CORRECT if reward >= 1 else Outcome.WRONG
    if named not in set(Outcome):
        return unverified(f"the reward function named an unknown verdict {named!r:.40}")
    return Verdict(Outcome(named), reward=float(reward))
