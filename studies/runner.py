"""Carries out a study: base models first, then its units on all cores, then the report.

Invariant: what is finished is kept. An interrupted study goes on where it was; a unit runs in one process on one
thread, so that its rows do not depend on how many run beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count
from typing import Any

from studies import find_study, report
from studies.store import RowStore
from studies.study import Setting, Study, Unit
from studies.verdict import Row, Verdict

Progress = Callable[[str, int, int], None]  # what was finished, done, all


def run_study(
    study: Study,
    setting: Setting,
    *,
    jobs: int = 1,
    fresh: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Verdict:
    """Run what is missing and write the report.

    Args:
        study: one of `studies.STUDIES`.
        setting: under which it runs.
        jobs: processes; a full-size study takes the whole machine for each unit and ignores it.
        fresh: forget earlier rows.
        progress: called after each base model and unit.

    Raises:
        UserError: the folder holds rows of another setting.
    """
    store = RowStore(setting.out, _settings(setting), fresh=fresh)
    units = [unit for unit in study.units(setting) if not store.has(unit.key)]
    # Rows that are there are judged again without the models that gave them.
    generations = [] if setting.full or not units else _missing_models(study, setting)
    total = sum(map(len, generations)) + len(units)
    workers = 1 if setting.full else max(1, min(jobs, total))
    done = count(1)

    def keep(pool: _Workers, some: list[Unit]) -> None:
        for key, rows, seconds in pool.each(_run_unit, [(study.name, unit, setting) for unit in some]):
            store.add(key, rows, seconds)
            progress(key, next(done), total)

    with _Workers(workers) as pool:
        for models in generations:
            for name in pool.each(_make_model, [(*model, setting) for model in models]):
                progress(f"base model {name}", next(done), total)
        keep(pool, [unit for unit in units if not unit.alone])
    keep(_Workers(1), [unit for unit in units if unit.alone])
    return report.write(study, setting, store.rows, sum(store.seconds.values()))


def _settings(setting: Setting) -> dict[str, Any]:
    """What rows depend on; more seeds only add rows."""
    return {"budget": str(setting.budget), "endpoint": setting.endpoint, "judge": setting.judge}


def _missing_models(study: Study, setting: Setting) -> list[list[tuple[str, int]]]:
    """Base models to make, parents before children."""
    wanted = list(study.models(setting))
    if not wanted:
        return []
    from studies.zoo import generations, is_made

    return [[model for model in some if not is_made(*model, setting)] for some in generations(wanted)]


def _make_model(name: str, seed: int, setting: Setting) -> str:
    from studies.zoo import make

    make(name, seed, setting)
    return f"{name}, seed {seed}"


def _run_unit(study: str, unit: Unit, setting: Setting) -> tuple[str, list[Row], float]:
    """Rows, and seconds: of CPU time where the unit computes in this process alone, which does not depend on what
    else the machine does; of wall-clock time where it starts others."""
    clock = time.perf_counter if unit.alone or setting.full else time.process_time
    started = clock()
    rows = find_study(study).run(unit, setting)
    return unit.key, rows, clock() - started


class _Workers:
    """Processes of one thread each; with one worker, this process."""

    def __init__(self, workers: int) -> None:
        self._pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_one_thread)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[..., Any], calls: Sequence[tuple]) -> Iterator[Any]:
        """Results in the order in which they are finished."""
        if self._pool is None:
            for call in calls:
                _one_thread()
                yield function(*call)
            return
        futures = [self._pool.submit(function, *call) for call in calls]
        for future in as_completed(futures):
            yield future.result()


def _one_thread() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # warnings would tear the progress bar
