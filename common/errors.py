"""Errors that a person can act on, and the exit codes that launchers act on.

Invariant: whatever the user got wrong is reported in one sentence that names the setting at fault, with
exit code 2 and nothing half-started; a traceback is only ever shown for our own defects.
"""

from __future__ import annotations

import sys

EXIT_USER_ERROR = 2  # the caller's mistake: starting again would fail again
EXIT_RESTART = 3  # this process is spoilt, a fresh one goes on (an engine that failed while weights changed)
EXIT_RUN_FAILED = 4  # the run is over: starting again would fail again


class SlipstreamError(Exception):
    """Base class of every error that Slipstream raises on purpose."""


class UserError(SlipstreamError):
    """Bad input: the message is one sentence that names the setting and, where possible, what would be valid.

    Args:
        message: one sentence, without a trailing newline; a full stop at its end is taken off, so that it can stand
            inside another one.
        setting: dotted name of the recipe key or command-line option at fault, or None.
    """

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        if not message.endswith(".."):  # an ellipsis, or the path of a folder's parent
            message = message.removesuffix(".")
        super().__init__(f"{setting}: {message}" if setting else message)
        self.setting = setting


class RunFailedError(SlipstreamError):
    """A run ended on an error that a restart does not cure; the message names the process and the cause."""


def report(error: UserError | RunFailedError) -> int:
    """Print the sentence as launchers look for it in a log; returns the exit code."""
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED
