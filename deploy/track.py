"""Deliver a run's points to MLflow, and when it has ended write its summary and figure.

Invariant: the summary and the figure are written whether or not MLflow can be reached.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from common.tracking.shipper import Shipper, ship_until_end, tracking_uri
from common.tracking.spool import Record, read_spool
from deploy.folder import read_recipe
from deploy.report import draw_progress, summarise, write_summary

log = logging.getLogger("slipstream.tracking")
NICENESS = 10
POLL_S = 0.5


def track_run(folder: Path) -> int:
    """Follow a run folder until its end; returns 0 when everything was delivered, 1 when MLflow never answered."""
    os.nice(NICENESS)
    recipe = read_recipe(folder)
    if not recipe.tracking.enabled:
        _finalise(folder, _wait_for_end(folder / "metrics.jsonl"))
        return 0
    shipper = Shipper(
        folder,
        tracking_uri(recipe.tracking.uri, recipe.run.root),
        recipe.tracking.experiment,
        recipe.run.name or folder.name,
    )
    delivered = ship_until_end(shipper, lambda end: _finalise(folder, end))
    if not delivered:
        _finalise(folder, _wait_for_end(folder / "metrics.jsonl"))
        log.warning("MLflow at %s did not answer; `slipstream track %s` delivers later", shipper.uri, folder)
    return 0 if delivered else 1


def _wait_for_end(spool: Path) -> Record:
    offset = 0
    while True:
        last = None
        for last in read_spool(spool, offset):
            offset = last.offset
        if last is not None and last.kind == "end":
            return last
        time.sleep(POLL_S)


def _finalise(folder: Path, end: Record) -> list[Path]:
    figure = draw_progress(folder, end.values["final"]["evaluations"])
    summary = write_summary(folder, summarise(folder, end.values))
    return [figure, summary, folder / "recipe.toml"]
