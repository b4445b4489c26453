"""Deliver a run's points to MLflow, and when it has ended write its summary and figure.

Invariant: the summary and the figure of a run that has an end are written whether or not MLflow can be reached; one
process at a time delivers a run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from broker.run_folder import is_served
from common import stacks
from common.errors import UserError
from common.run_files import RECIPE_FILE, SPOOL
from common.tracking.shipper import (
    INTERRUPTED,
    PATIENCE_S,
    POLL_S,
    Shipper,
    SpoolEnd,
    ship_until_end,
    tracking_uri,
)
from common.tracking.spool import Record
from common.tracking.tags import run_tags
from deploy.folder import read_recipe
from deploy.report import draw_progress, summarise, write_summary

log = logging.getLogger("slipstream.tracking")
NICENESS = 10
LOCK_S = 5.0  # a tracker that ends with its broker may take a moment to go


def track_run(folder: Path, patience_s: float = PATIENCE_S, *, by_hand: bool = False) -> int:
    """Follow a run folder until its end; returns 0 when everything was delivered, 1 when MLflow did not answer.

    Args:
        folder: of the run.
        patience_s: seconds to go on trying after the end.
        by_hand: a run that nobody serves counts as ended. Not so for the broker's own tracker, which is there first.

    Raises:
        UserError: another process delivers this run.
    """
    stacks.arm()
    os.nice(NICENESS)
    recipe = read_recipe(folder)

    def interrupted() -> bool:
        return by_hand and not is_served(folder)

    if not recipe.tracking.enabled:
        _finalise(folder, _wait_for_end(folder / SPOOL, interrupted))
        return 0
    with _alone(folder):
        shipper = Shipper(
            folder,
            tracking_uri(recipe.tracking.uri, recipe.run.root),
            recipe.tracking.experiment,
            recipe.run.name or folder.name,
            tags=run_tags(recipe, folder),
            files=[folder / RECIPE_FILE],
        )
        if ship_until_end(
            shipper, lambda end: _finalise(folder, end), patience_s=patience_s, interrupted=interrupted
        ):
            return 0
    log.warning(
        "MLflow at %s did not answer; `slipstream track %s` delivers later", shipper.shown_uri, folder
    )
    return 1


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "tracking.lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is already delivering '{folder}' to MLflow; nothing to do.",
                        setting="RUN",
                    ) from None
                time.sleep(0.1)
        yield


def _wait_for_end(path: Path, interrupted: Callable[[], bool]) -> Record:
    spool = SpoolEnd(path)
    while (end := spool.or_interruption(interrupted)) is None:
        time.sleep(POLL_S)
    return end


def _finalise(folder: Path, end: Record) -> list[Path]:
    kept = [folder / RECIPE_FILE, folder / SPOOL]
    if end.kind == INTERRUPTED:  # the broker left no last status to sum up
        log.info("'%s' is not served and has no end: what there is goes to MLflow", folder)
        return [path for path in kept if path.exists()]
    figure = draw_progress(folder, end.values["final"]["evaluations"])
    summary = write_summary(folder, summarise(folder, end.values))
    return [figure, summary, *kept]
