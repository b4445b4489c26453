"""`slipstream run` as a user types it, and what is left of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.curve import Curve
from common.run_files import SPOOL, SUMMARY_FILE
from deploy.launch.supervisor import command

# No evaluation, checkpoint or tracker on the way: what a trainer that is compared does not do either.
BARE = ("eval.sets=[]", "learner.checkpoint_every=1000000", "tracking.enabled=false")


@dataclass(frozen=True)
class WholeRun:
    """A run that has ended: its curve and its summary.json."""

    curve: Curve
    summary: dict[str, Any]


def run(recipe: str, overrides: Sequence[str], root: Path) -> WholeRun:
    """Run a recipe to its last step in the empty folder `root`.

    Raises:
        subprocess.CalledProcessError: the run failed; it has said why on standard error.
    """
    launched = time.time()
    with running(recipe, overrides, root) as process:
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, process.args)
    (folder,) = root.iterdir()
    return WholeRun(_curve(folder, launched), json.loads((folder / SUMMARY_FILE).read_text()))


def run_command(recipe: str, settings: Iterable[str]) -> list[str]:
    """The command line that runs a recipe with `--set` for each setting ("key=value")."""
    options = [word for setting in settings for word in ("--set", setting)]
    return command("run", recipe, "--quiet", *options)


@contextmanager
def running(recipe: str, overrides: Sequence[str], root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a run; ended with the block."""
    process = subprocess.Popen(run_command(recipe, (f'run.root="{root}"', *overrides)), stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _curve(folder: Path, launched: float) -> Curve:
    records = [json.loads(line) for line in (folder / SPOOL).read_text().splitlines()]
    (end,) = (record["values"]["final"] for record in records if record["kind"] == "end")
    steps = [record for record in records if record["kind"] == "learner"]
    started = end["first_lease_time"]
    rewards = [step["values"]["reward"] for step in steps]
    return Curve(started, [step["time"] for step in steps], rewards, started - launched)
