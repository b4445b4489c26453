"""Which jobs of the cluster belong to a run: `<run folder>/slurm/state.json`.

Invariant: the file is replaced whole, and only under a lock, so that two people who scale a run at one time
take turns.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_json
from common.run_files import SLURM_FOLDER, SLURM_STATE_FILE


@dataclass
class State:
    """Jobs of a run.

    Attributes:
        run: its name.
        head: number of the job with broker and learner.
        arrays: numbers of the actors' job arrays, oldest first.
        leaving: array tasks ("JOB_INDEX") that were asked to leave and may not have yet.
        options: what was asked of Slurm (`deploy.slurm.plan.Options`).
        finds_addresses: the head's script sets `broker.bind` and `weights.bind`, the recipe does not.
    """

    run: str
    head: int
    arrays: list[int] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    finds_addresses: bool = False


def write_state(folder: Path, state: State) -> None:
    """Replace the state of the run in `folder`."""
    replace_json(folder / SLURM_FOLDER / SLURM_STATE_FILE, asdict(state), indent=2)


def read_state(folder: Path) -> State:
    """The state of the run in `folder`.

    Raises:
        UserError: the run was not submitted to Slurm, or the file is damaged.
    """
    path = folder / SLURM_FOLDER / SLURM_STATE_FILE
    try:
        return State(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' was not submitted to Slurm (no {SLURM_FOLDER}/{SLURM_STATE_FILE})."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None


def earlier_state(folder: Path) -> State | None:
    """The same; None where the run was never submitted."""
    return read_state(folder) if (folder / SLURM_FOLDER / SLURM_STATE_FILE).exists() else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's Slurm state for this process alone.

    Raises:
        UserError: the folder cannot be written, or its file system does not lock files.
    """
    from broker.run_folder import no_flock

    try:
        file = (folder / SLURM_FOLDER / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write '{folder / SLURM_FOLDER}': {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"the file system of '{folder}' {no_flock(error)}") from None
        yield
