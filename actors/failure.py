"""Why an engine did not start: the error of the process where it happened, not that of the one that waited.

Invariant: vLLM's processes write every exception that they log to a file of this actor's, wherever vLLM starts
them (forked, spawned, one per tensor-parallel rank); the sentence that a user reads is the first of them that is
an error in itself, rather than the news that another process had one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import tempfile
from pathlib import Path

VARIABLE = "SLIPSTREAM_ENGINE_ERRORS"
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")  # where they say why they end
HEARSAY = ("root cause", "cancelled", "enginedeaderror")  # news of another process's error
SENTENCE = 400
KILLED = re.compile(r"'[^']+': -(\d+)")  # vLLM's list of failed processes: name and exit code


class _Keeper(logging.Filter):
    """Appends the exception of a record to the file, one line of JSON each, and lets the record pass.

    A filter, not a handler: vLLM configures logging anew in each process, which removes handlers.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        path = os.environ.get(VARIABLE)
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if path and error is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([type(error).__name__, str(error)]) + "\n")
        return True


def keep_errors() -> None:
    """Keep what vLLM logs in this process, and in those forked from it; called wherever our classes are loaded."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(kept, _Keeper) for kept in logger.filters):
            logger.addFilter(_Keeper())


class EngineErrors:
    """While it is open, this process and those that it starts keep their errors here."""

    def __enter__(self) -> EngineErrors:
        descriptor, name = tempfile.mkstemp(prefix="slipstream-engine-")
        os.close(descriptor)
        self._path = Path(name)
        os.environ[VARIABLE] = name
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(VARIABLE, None)
        self._path.unlink(missing_ok=True)

    def reason(self, error: BaseException) -> str:
        """One sentence for `error`, which vLLM raised: the first cause that was kept, else its own words."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        for kind, text in map(json.loads, lines):
            if not _hearsay(f"{kind} {text}"):
                return f"{kind}: {_sentence(text)}" if text else kind
        if killed := KILLED.search(str(error)):
            name = signal.Signals(int(killed[1])).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{memory}"
        return _sentence(str(error)) or type(error).__name__


def _hearsay(text: str) -> bool:
    return any(words in text.lower() for words in HEARSAY)


def _sentence(text: str) -> str:
    """The telling line of an error's text: pydantic's errors begin with a count and the name of a class."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and re.match(r"\d+ validation errors? for ", lines[0]):
        lines = [line for line in lines[1:] if len(line.split()) > 2] or lines
        lines[0] = re.sub(r"^Value error, | \[type=.*$", "", lines[0])
    return lines[0][:SENTENCE] if lines else ""
