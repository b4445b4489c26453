"""How the end of a rank reaches whoever started the ranks: torchrun turns every failure of a rank into exit code 1.

Invariant: the file `learner.exit` of the run folder is there only when a rank ended on something that a restart
does not cure, and holds that exit code (2 or 4). Whoever starts the ranks removes it first and, when they have
failed, believes it more than the launcher of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR, RunFailedError, UserError
from common.run_files import OUTCOME_FILE


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
