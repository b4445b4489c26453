"""The run folder: one run, one folder, never two.

Invariant: a folder that holds a run is never written by another, and not at all while a broker serves it; it is
continued on purpose (--resume) or set aside whole (--fresh), never mixed and never deleted.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from broker.run_folder import HELD, is_served
from common.errors import UserError
from common.recipe import Recipe, load_recipe, resolved_toml
from common.run_files import (
    ADDRESS_FILE,
    CHECKPOINTS_FOLDER,
    EXPORT_FOLDER,
    JOURNAL_FOLDER,
    LEDGER_FILE,
    RECIPE_FILE,
    SLURM_FOLDER,
    SPOOL,
)
from common.tracking.shipper import SpoolEnd
from common.tracking.spool import Record


def holds_a_run(folder: Path) -> bool:
    """Whether a run was started in this folder before."""
    return (folder / RECIPE_FILE).exists()


def prepare(recipe: Recipe, *, resume: bool, fresh: bool) -> Path:
    """Make the run folder and keep the resolved recipe in it.

    Raises:
        UserError: the folder holds a run and neither --resume nor --fresh was given, or the reverse; or a broker
            serves it; or the recipe changes what may not change within a run. Nothing is then written.
    """
    folder = recipe.folder
    if resume and fresh:
        raise UserError("--resume continues a run and --fresh begins another: give one of them.")
    if is_served(folder):
        raise _served(folder)
    if resume and not holds_a_run(folder):
        raise UserError(f"--resume finds no run in '{folder}'.", setting="run.name")
    if holds_a_run(folder) and not resume:
        if not fresh:
            raise _taken(folder)
        _set_aside(folder)
    text = resolved_toml(recipe)
    if resume and text != (folder / RECIPE_FILE).read_text(encoding="utf-8"):
        check_same_run(recipe, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RECIPE_FILE).open("w" if resume else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if holds_a_run(folder) and isinstance(error, FileExistsError):
            raise _taken(folder) from None  # by somebody who began at the same moment
        raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="run.root") from None
    return folder


def _served(folder: Path) -> UserError:
    return UserError(
        f"'{folder}' is being served; stop it first (slipstream stop {folder}), or choose another name.",
        setting="run.name",
    )


def _taken(folder: Path) -> UserError:
    return UserError(
        f"'{folder}' already holds a run: continue it with --resume, set it aside with --fresh, or choose another name.",
        setting="run.name",
    )


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """Keep other launchers out of the folder of a run: before its broker serves it they would change its recipe.

    Raises:
        UserError: another launcher has it, or it cannot be written.
    """
    try:
        file = (folder / RECIPE_FILE).open("r+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="run.root") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise _served(folder) from None
            # A file system without locks: its broker will say so.
        yield


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Refuse before anything is written what the broker would refuse: another seed, batch or question set.

    Raises:
        UserError: names the setting.
    """
    from broker.index import Index
    from broker.main import identity
    from broker.state import load_training_set

    path = folder / JOURNAL_FOLDER / LEDGER_FILE
    if not path.is_file():
        return
    with closing(Index(path, read_only=True)) as index:
        if index.meta("identity") is not None:  # else it holds nothing yet
            index.identify(identity(recipe, load_training_set(recipe)))


def _set_aside(folder: Path) -> None:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)


def find_folder(name: str) -> Path:
    """The folder of a run: a path, or a name below ./runs.

    Raises:
        UserError: there is none.
    """
    for candidate in (Path(name), Path("runs") / name):
        if holds_a_run(candidate):
            return candidate
    raise UserError(f"'{name}' is neither a run folder nor a run below ./runs.")


def resume_command(folder: Path) -> str:
    """What goes on with the run of a folder, where it ran before: on Slurm, or on one machine."""
    verb = "submit" if (folder / SLURM_FOLDER).is_dir() else "run"
    return f"slipstream {verb} {folder / RECIPE_FILE} --resume"


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    return load_recipe(folder / RECIPE_FILE)


def last_end(folder: Path) -> Record | None:
    """The run's `end` record (values `status`, `reason`, `final`: the broker's last status), if nothing follows it."""
    return SpoolEnd(folder / SPOOL).end()


def questions_ran_out(final: Mapping[str, Any]) -> bool:
    """Whether a finished run of this last status ended before `run.steps`, for want of questions."""
    return final["step"] < final["steps_total"]


def check_unfinished(recipe: Recipe) -> None:
    """Refuse to continue a finished run that has nothing left to do.

    Raises:
        UserError: names the setting that would give it something.
    """
    end = last_end(recipe.folder)
    if end is None or end.values.get("status") != "finished":
        return
    final = end.values["final"]
    if (pinned := final.get("pinned")) is not None and pinned["step"] < final["step"]:
        return  # its model was not saved: the disk was full, say
    done = f"'{recipe.folder}' finished at step {final['step']} of {final['steps_total']}"
    if recipe.run.steps <= final["step"]:
        raise UserError(f"{done}; raise run.steps to go on.", setting="run.steps")
    if questions_ran_out(final) and recipe.data.max_epochs <= read_recipe(recipe.folder).data.max_epochs:
        raise UserError(
            f"{done}, when its questions ran out; raise data.max_epochs to go on.", setting="data.max_epochs"
        )


def newest_model(folder: Path) -> Path | None:
    """The run's newest checkpoint in the format of Hugging Face, or None; one of this name is complete."""
    configs = folder.glob(f"{CHECKPOINTS_FOLDER}/step-*/{EXPORT_FOLDER}/config.json")
    return max((config.parent for config in configs), default=None)


def read_address(folder: Path) -> dict[str, Any] | None:
    """What the broker wrote about itself: `address`, `run`, `pid`, ...; None before it has."""
    try:
        return json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def wait_for_address(folder: Path, seconds: float) -> dict[str, Any]:
    """Wait until the broker has written its address.

    Raises:
        UserError: it has not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := read_address(folder)) is not None:
            return found
        time.sleep(0.05)
    raise UserError(
        f"no broker has written {folder / ADDRESS_FILE} for {seconds:.0f} s; is one running?", setting="--run"
    )


def newest_folder(root: Path = Path("runs")) -> Path:
    """The run folder whose broker announced itself last; where none has a broker, the one prepared last.

    Raises:
        UserError: no run below `root`.
    """
    for file in (ADDRESS_FILE, RECIPE_FILE):
        if found := list(root.glob(f"*/{file}")):
            return max(found, key=lambda path: path.stat().st_mtime).parent
    raise UserError(f"no run below ./{root}; name one, or give --join.", setting="RUN")
