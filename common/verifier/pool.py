"""A pool of processes that scores responses and can be stopped at a deadline.

Invariants:
- every response gets exactly one verdict, in the order asked; a verification that hangs, crashes or is killed is
  `unverified` with the reason, and the pool goes on with a fresh worker;
- the event loop is never blocked: cheap cases are answered in place, the rest is awaited;
- workers are spawned, never forked, without importing the caller's main module, so they hold neither its GPU state nor
  its libraries; they die with their parent.
"""

from __future__ import annotations

import asyncio
import multiprocessing.context
import os
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, TimeoutError
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import popen_spawn_posix
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from ..errors import UserError
from . import worker
from .extract import Extraction, Template, extract
from .grade import Gold, Level, answers_of, check_options, gold_texts, obviously_equal
from .normalise import MAX_CHARS
from .verdict import Verdict, correct, unformatted, unverified, wrong

Key = tuple[tuple[str, ...], tuple[str, ...]]

_MAIN_LOCK = threading.Lock()


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hides the main module while a child starts: spawn would import it there, and it may import an engine."""
    with _MAIN_LOCK:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _WorkerProcess(multiprocessing.context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  (the hook's name in multiprocessing)
        with _nameless_main():
            return popen_spawn_posix.Popen(process_obj)


class _WorkerContext(multiprocessing.context.SpawnContext):
    Process = _WorkerProcess


class VerifierPool:
    """Scores responses in worker processes.

    Args:
        workers: number of processes, at least 1.
        deadline_s: seconds of wall time that one response may take in a worker before the worker is killed.
        level: `fast` or `full`.
        template: where the answer must stand (`extract`).
        allow_tag_whitespace: see `extract`.
        cache_size: verdicts kept for repeated (answer, gold) pairs; 0 keeps none. Custom rewards are not cached.
        reward: dotted path of a custom reward function (`rewards`), or None for the mathematics verifier.

    Raises:
        UserError: an option is out of range or unknown.
    """

    def __init__(
        self,
        workers: int = 2,
        deadline_s: float = 2.0,
        level: Level = "fast",
        template: Template = "boxed",
        *,
        allow_tag_whitespace: bool = False,
        cache_size: int = 4096,
        reward: str | None = None,
    ) -> None:
        check_options(level, template)
        if workers < 1:
            raise UserError(f"at least 1 worker, not {workers}", setting="verifier.workers")
        if not deadline_s > 0:
            raise UserError(f"a positive number of seconds, not {deadline_s}", setting="verifier.deadline_s")
        self.level = level
        self.template = template
        self.deadline_s = deadline_s
        self.allow_tag_whitespace = allow_tag_whitespace
        self.reward = reward
        self._cache: OrderedDict[Key, Verdict] = OrderedDict()
        self._cache_size = cache_size
        self._pending: set[Future] = set()
        self._window = 8 * workers
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=worker.start,
            initargs=(os.getpid(), level, reward),
            context=_WorkerContext(),
        )

    @classmethod
    def from_recipe(cls, recipe: Any, template: Any) -> Self:
        """The pool that a recipe asks for.

        Args:
            recipe: a `common.recipe.Recipe`: its `verifier` section and `data.reward`.
            template: the resolved prompt template; its `extraction` says where answers stand.
        """
        section = recipe.verifier
        return cls(
            workers=section.workers,
            deadline_s=section.deadline_s,
            level=section.level,
            template=template.extraction,
            allow_tag_whitespace=section.allow_tag_whitespace,
            reward=None if recipe.data.reward == "math" else recipe.data.reward,
        )

    # -- asynchronous -------------------------------------------------------------------------------------------

    async def grade(self, response: str, question: Gold | Mapping[str, Any]) -> Verdict:
        """Scores one response without blocking the event loop.

        Args:
            response: what the model wrote.
            question: the gold answer, or a row of a question set with its gold answer under `answer`; a custom reward
                function needs the row.

        Raises:
            UserError: the gold answer is of an unknown type.
        """
        key, pending = self._grading(response, question)
        if isinstance(pending, Verdict):
            return pending
        await asyncio.wait([asyncio.wrap_future(_completion(pending))])
        return self._collect(key, pending)

    # -- synchronous --------------------------------------------------------------------------------------------

    def grade_many(self, pairs: Iterable[tuple[str, Gold | Mapping[str, Any]]]) -> list[Verdict]:
        """Scores (response, gold or question) pairs; verdicts in the same order. See `grade`."""
        return list(self.grade_stream(pairs))

    def grade_stream(self, pairs: Iterable[tuple[str, Gold | Mapping[str, Any]]]) -> Iterator[Verdict]:
        """As `grade_many`, lazily: at most a few pairs per worker are read ahead."""
        window: deque[tuple[Key | None, Verdict | Future]] = deque()
        for response, question in pairs:
            window.append(self._grading(response, question))
            while len(window) >= self._window or (window and isinstance(window[0][1], Verdict)):
                yield self._collect(*window.popleft())
        while window:
            yield self._collect(*window.popleft())

    # -- one response -------------------------------------------------------------------------------------------

    def _grading(
        self, response: str, question: Gold | Mapping[str, Any]
    ) -> tuple[Key | None, Verdict | Future]:
        """A verdict at once for a cheap or known case, else the future of a task and the key of its answer."""
        if self.reward is not None:
            row = dict(question) if isinstance(question, Mapping) else {"answer": question}
            return None, self._submit(worker.run_reward, response, row)
        golds = gold_texts(question["answer"] if isinstance(question, Mapping) else question)
        found = extract(response, self.template, allow_tag_whitespace=self.allow_tag_whitespace)
        if (cheap := _cheap(found, golds)) is not None:
            return None, cheap
        key = (answers_of(found, self.template, self.level), golds)
        if key in self._cache:
            self._cache.move_to_end(key)
            return None, self._cache[key]
        return key, self._submit(worker.grade_answer, *key, self.level)

    def _submit(self, function: Any, *args: Any) -> Verdict | Future:
        try:
            future = self._pool.submit(function, self.deadline_s, *args)
        except RuntimeError as error:  # closed, or its workers cannot start
            return unverified(f"the verifier's pool is closed: {error}")
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _collect(self, key: Key | None, pending: Verdict | Future) -> Verdict:
        """Waits for a task; whatever went wrong becomes `unverified`."""
        if isinstance(pending, Verdict):
            return pending
        extracted = key[0][0] if key is not None else None
        try:
            verdict = pending.result()
        except TimeoutError:
            return unverified(f"killed at its deadline of {self.deadline_s:g} s", extracted, self.deadline_s)
        except ProcessExpired as error:
            return unverified(f"the verifier's process died with exit code {error.exitcode}", extracted)
        except CancelledError:
            return unverified("the verifier's pool was closed", extracted)
        except Exception as error:
            return unverified(f"the verifier failed: {type(error).__name__}: {error}", extracted)
        if key is not None and self._cache_size > 0:
            self._cache[key] = replace(verdict, seconds=0.0)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return verdict

    # -- life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stops the workers at once; tasks still waiting become `unverified`. Closing twice is harmless."""
        for future in tuple(self._pending):  # pebble leaves them unanswered for ever
            future.cancel()
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cheap(found: Extraction, golds: tuple[str, ...]) -> Verdict | None:
    """Verdicts that need no worker: nothing extracted, an answer too long to be one, or a literal match."""
    if found.answer is None:
        return unformatted(found.reason or "no answer")
    if any(obviously_equal(found.answer, g) for g in golds):
        return correct(found.answer)
    if len(found.answer) > MAX_CHARS and not found.alternatives:
        return wrong(found.answer)
    return None


def _completion(future: Future) -> Future:
    """A future that completes when the task does, whatever its outcome, and whose cancellation leaves the task alone."""
    done: Future = Future()
    future.add_done_callback(lambda _: done.set_result(None) if not done.cancelled() else None)
    return done
