"""Train again on a recorded run, alone: to debug the learner without actors.

Invariant: the recorded run is only read; each replay is a run of its own, in a folder beside the recorded one, with
the recorded recipe and the threads that the launcher gave the recorded learner (another number of threads adds up
in another order), so that a replay can be compared with the record and with other replays.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import typer

from broker.recording import open_recording
from broker.state import load_training_set, rules_of
from common.errors import UserError
from common.process import die_with_parent
from common.program import own_program
from common.recipe import Recipe, resolved_toml
from common.run_files import RECIPE_FILE
from deploy.folder import find_folder, newest_model, read_address, read_recipe
from deploy.launch.layout import share_out
from deploy.launch.machine import this_machine
from deploy.launch.supervisor import first_error

START_S = 60.0
LOOPBACK = "127.0.0.1"


def start_replay(name: str) -> Path:
    """Start a broker that serves a recorded run again; returns the folder of the replay.

    The broker dies with this process, and leaves when the last recorded step is trained.

    Raises:
        UserError: there is no such run, it kept no record (no folder is made then), or its broker did not start
            (`broker.log` of the replay says why).
    """
    recorded = find_folder(name)
    recipe = replay_recipe(read_recipe(recorded), recorded)
    steps = _recorded_steps(recipe, recorded)
    folder = recipe.folder
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(resolved_toml(recipe), encoding="utf-8")
    _take_learners_share(recipe)
    command = [*own_program(), "broker", str(folder / RECIPE_FILE), "--resume"]
    with (folder / "broker.log").open("ab") as log:
        broker = subprocess.Popen(
            [*command, "--replay", str(recorded)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    _wait(broker, folder)
    typer.echo(f"training on the {steps} recorded steps of '{recorded}', in '{folder}'")
    return folder


def say_trained(folder: Path) -> None:
    """Where a replay that has ended well left its model."""
    typer.echo(f"trained; the model is in '{newest_model(folder) or folder}'")


def _recorded_steps(recipe: Recipe, recorded: Path) -> int:
    questions = load_training_set(recipe)
    ledger, store = open_recording(recorded, rules_of(recipe, len(questions)))
    store.close()
    return ledger.last_step + 1


def _take_learners_share(recipe: Recipe) -> None:
    """Give this process the threads and GPUs that the launcher would, where the environment does not say.

    On a machine that cannot hold the whole run the learner alone may still fit: it takes what there is.
    """
    try:
        layout = share_out(recipe, *this_machine())
    except UserError:
        return
    for variable, value in layout.learner.environment().items():
        os.environ.setdefault(variable, value)


def _wait(broker: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while read_address(folder) is None:
        if broker.poll() is not None:
            why = first_error(folder / "broker.log") or "its broker did not start."
            raise UserError(why.removeprefix("--replay: "), setting="--replay")
        if time.monotonic() > deadline:
            raise UserError(f"its broker is not ready after {START_S:.0f} s.", setting="--replay")
        time.sleep(0.05)


def replay_recipe(recipe: Recipe, recorded: Path) -> Recipe:
    """The recorded recipe under a name of its own, on this machine: no evaluation, no MLflow, no further record."""
    number = 1
    while (recorded.parent / f"{recorded.name}-replay-{number}").exists():
        number += 1
    changes = {
        "run": {"name": f"{recorded.name}-replay-{number}", "root": recorded.parent},
        "eval": {"sets": ()},
        "tracking": {"enabled": False},
        "broker": {"record": False, "bind": LOOPBACK, "port": 0, "metrics_port": 0},
        "weights": {"bind": LOOPBACK, "port": 0},  # the recorded one may name the address of another host
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update=sections)
