"""How the end of a rank reaches whoever started the ranks: torchrun turns every failure of a rank into exit code 1.

Invariant: the file `learner.exit` of the run folder is there only when a rank ended on something that a restart
does not cure, and holds that exit code (2 or 4). Whoever starts the ranks removes it first and, when they have
failed, believes it more than the launcher of the ranks.

What no restart cures may show only in time: a learner that crashes at the same step each time, minutes after its
start. Launchers count the deaths of a short time; `learner.starts` counts those without a step in between, whoever
starts the learner again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR, RunFailedError, UserError
from common.files import replace_json
from common.run_files import OUTCOME_FILE, STARTS_FILE


@contextmanager
def kept_outcome(folder: Path) -> Iterator[None]:
    """Keep the exit code of a `UserError` or `RunFailedError` raised inside, which passes on, in the run folder."""
    try:
        yield
    except (UserError, RunFailedError) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED
        with suppress(OSError):  # a full disk must not hide the error itself
            (folder / OUTCOME_FILE).write_text(f"{code}\n", encoding="ascii")
        raise


def forget_outcome(folder: Path) -> None:
    """Remove what an earlier start of the learner has left."""
    (folder / OUTCOME_FILE).unlink(missing_ok=True)


def read_outcome(folder: Path) -> int | None:
    """The exit code that a rank has left; None when none has, or it cannot be read."""
    try:
        return int((folder / OUTCOME_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def count_start(folder: Path, step: int, restarts: int) -> None:
    """Note that the learner starts while the run is at `step`.

    Raises:
        RunFailedError: more than `restarts` starts in a row have brought it no further. Who starts it again after
            that has seen to the cause: the count begins anew.
    """
    reached, times = _starts(folder)
    reached, times = (step, 0) if step > reached else (reached, times + 1)
    if times > restarts:
        forget_starts(folder)
        raise RunFailedError(
            f"the learner has crashed {times} times at step {reached}, more often than launch.restarts = {restarts} "
            f"allows: {folder / 'learner.log'} says why"
        )
    with suppress(OSError):  # a full disk is no reason not to start
        replace_json(folder / STARTS_FILE, {"reached": reached, "times": times})


def _starts(folder: Path) -> tuple[int, int]:
    try:
        kept = json.loads((folder / STARTS_FILE).read_text(encoding="utf-8"))
        return int(kept["reached"]), int(kept["times"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1, 0


def forget_starts(folder: Path) -> None:
    """The learner has ended in order, or a person starts the run again: earlier crashes count no more."""
    (folder / STARTS_FILE).unlink(missing_ok=True)
