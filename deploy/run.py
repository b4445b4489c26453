"""`slipstream run`: a whole run on this machine.

Invariant: it uses nothing that a person could not type (the verbs broker, actor, learner), shows one screen
while the run goes on, and leaves no process behind, whatever way it ends.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.run_files import ADDRESS_FILE, RECIPE_FILE
from deploy.check import RecipeArgument, SetOption

if TYPE_CHECKING:
    from common.process import StopSignal
    from common.recipe import Recipe
    from deploy.display import Display
    from deploy.launch.supervisor import Supervisor, Worker

POLL_S = 0.1
SAVE_S = 120.0  # for the learner to write a checkpoint when the broker cannot be asked to end the run
ORDERLY_S = 6.0  # for the others, once the learner has written its checkpoint and left
TERM_S = 1.5  # then SIGTERM, then SIGKILL
END_S = 20.0  # for the others to leave by themselves, once the broker has: it left last


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in its folder from the newest checkpoint.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option(help="Set an earlier run of this name aside and begin again.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No live display: one line now and then.")] = False,
) -> None:
    """Run a recipe on this machine: broker, actors and learner, supervised, with a live display.

    Ctrl-C stops it in order: the learner finishes its step and writes a checkpoint, from which `--resume` goes on. A
    second Ctrl-C ends everything at once.
    """
    from common.errors import EXIT_USER_ERROR
    from common.recipe import load_recipe
    from deploy.folder import check_unfinished, holds_a_run, launching, prepare
    from deploy.preflight import preflight

    loaded = load_recipe(recipe, overrides or ())
    preflight(loaded)
    with ExitStack() as held:
        if holds_a_run(loaded.folder):
            held.enter_context(launching(loaded.folder))
        if resume:
            check_unfinished(loaded)
        changes = _what_changes(loaded) if resume else []
        before = _recipe_text(loaded.folder) if resume else None
        folder = prepare(loaded, resume=resume, fresh=fresh)
        if not resume:
            held.enter_context(launching(folder))
        for line in changes:
            typer.echo(line)
        code = run_here(loaded, folder, resume=resume, quiet=quiet)
        if code == EXIT_USER_ERROR and before is not None:
            # A worker refused what changed: the folder's own recipe is what the run goes on with.
            (folder / RECIPE_FILE).write_text(before, encoding="utf-8")
    raise typer.Exit(code)


def _recipe_text(folder: Path) -> str | None:
    path = folder / RECIPE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _what_changes(recipe: Recipe) -> list[str]:
    """Name the settings that a resumed run had otherwise until now: those of an earlier --set are easily forgotten."""
    from common.errors import UserError
    from common.tracking.tables import flatten
    from deploy.folder import holds_a_run, read_recipe, resume_command

    if not holds_a_run(recipe.folder):
        return []
    try:
        before = flatten(read_recipe(recipe.folder).model_dump(mode="json"))
    except UserError as error:  # written by another release
        return [f"what the run was started with cannot be compared: {error}"]
    now = flatten(recipe.model_dump(mode="json"))
    keys = sorted(key for key in before.keys() | now.keys() if key != "run.root")
    changed = [key for key in keys if before.get(key) != now.get(key)]
    lines = [f"resumed with {key} = {now.get(key)!r}; until now {before.get(key)!r}" for key in changed]
    if changed:
        lines.append(f"to go on with everything as it was: {resume_command(recipe.folder)}")
    return lines


def run_here(recipe: Recipe, folder: Path, *, resume: bool, quiet: bool) -> int:
    """Launch, watch and end a run whose folder is prepared; returns the exit code."""
    from broker.run_folder import is_served
    from common.process import StopSignal
    from deploy.display import Display
    from deploy.launch.supervisor import Supervisor
    from learner.outcome import forget_starts

    address = folder / ADDRESS_FILE
    address.unlink(missing_ok=True)
    forget_starts(folder)
    display, silence = Display(recipe, folder, quiet=quiet), Silence(recipe.broker.no_progress_s)
    supervisor = Supervisor(_workers(recipe, folder, resume), recipe.launch.restarts, display.say)
    interrupts = StopSignal()  # the first asks for an orderly end, the second for an immediate one
    supervisor.start()
    try:
        with display:
            while supervisor.poll() and not interrupts.count:
                display.refresh()
                if silence.look(display.broker_silent_s()):
                    _keep_stacks(supervisor, display)
                time.sleep(POLL_S)
            if interrupts.count:
                return _stop(supervisor, display, interrupts, recipe.broker.dead_after_s)
            if supervisor.failure is not None:
                _save_work(supervisor, display, interrupts, recipe.broker.dead_after_s)
        if supervisor.failure is None:
            _let_leave(supervisor, interrupts)
    finally:
        supervisor.end(term_s=TERM_S)
        if not is_served(folder):  # by the broker of another launcher, that came first
            address.unlink(missing_ok=True)  # one that had to be killed has left it behind
    return _conclude(supervisor, display, folder)


def _workers(recipe: Recipe, folder: Path, resume: bool) -> list[Worker]:
    from deploy.launch.layout import share_out
    from deploy.launch.machine import this_machine
    from deploy.launch.supervisor import Worker, command

    layout = share_out(recipe, *this_machine())
    resolved, run_folder = str(folder / RECIPE_FILE), str(folder)
    ranks = ["--ranks", str(recipe.learner.ranks)] if recipe.learner.ranks > 1 else []
    learn = ["learner", "--run", run_folder, *ranks]
    workers = [
        Worker(
            "broker",
            command("broker", resolved, "--resume"),
            command("broker", resolved, "--resume"),
            layout.broker,
            folder / "broker.log",
            essential=True,
        ),
        Worker(
            "learner",
            command(*learn, *(["--resume"] if resume else [])),
            command(*learn, "--resume"),
            layout.learner,
            folder / "learner.log",
            needed=True,
        ),
    ]
    for number, share in enumerate(layout.actors):
        name = f"actor-{number}"
        line = command("actor", "--run", run_folder, "--name", name)
        workers.append(Worker(name, line, line, share, folder / f"{name}.log", spare=True))
    # The engine takes longest to start, so actors go first; they wait for the broker's address themselves.
    return workers[2:] + workers[:2]


class Silence:
    """The broker watches the run; who watches the broker is its launcher. One alarm per silence of `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._alarmed = False

    def look(self, silent_s: float) -> bool:
        """True once when the broker has not answered for `limit_s` seconds."""
        due = silent_s >= self._limit_s
        raised, self._alarmed = due and not self._alarmed, due
        return raised


def _keep_stacks(supervisor: Supervisor, display: Display) -> None:
    silent = display.broker_silent_s()
    try:
        where = f"{supervisor.keep_stacks(display.folder / 'stacks')}-*.txt"
    except OSError as error:
        where = f"nowhere ({error.strerror})"
    display.say(f"the broker has not answered for {silent:.0f} s; stacks of every process went to {where}")


def _let_leave(supervisor: Supervisor, interrupts: StopSignal) -> None:
    """The run is over: wait for those that heard it. Who never joined did not, and is ended; so is all by Ctrl-C."""
    deadline = time.monotonic() + END_S
    while not interrupts.count and time.monotonic() < deadline and not supervisor.wait(POLL_S):
        pass


def _stop(supervisor: Supervisor, display: Display, interrupts: StopSignal, patience_s: float) -> int:
    """End the run in order, for as long as the learner and the broker are at it; see `broker.ending`.

    Args:
        patience_s: silence of the broker after which nobody is waited for.
    """
    from deploy.folder import resume_command

    display.say(
        "stopping: actors hand back their work, the learner finishes its step and writes a checkpoint; "
        "Ctrl-C again ends everything at once, without it"
    )
    _end_in_order(supervisor, display, interrupts, patience_s, "stopped by the user")
    display.say_where()
    where = "" if display.step is None else f" at step {display.step}"
    display.say(f"stopped{where}; continue with: {resume_command(display.folder)}")
    return 130


def _save_work(supervisor: Supervisor, display: Display, interrupts: StopSignal, patience_s: float) -> None:
    """A worker has failed for good: before all are ended, the learner writes down what it has learnt."""
    failure = supervisor.failure
    assert failure is not None
    if not display.step or supervisor.left("learner"):
        return
    display.say(
        f"{failure.worker} has failed for good: {failure.message}; the learner still writes a checkpoint"
    )
    if not supervisor.left("broker"):
        _end_in_order(supervisor, display, interrupts, patience_s, f"{failure.worker} failed")
        return
    supervisor.ask_to_leave("learner")
    deadline = time.monotonic() + SAVE_S
    while not (supervisor.left("learner") or interrupts.count or time.monotonic() > deadline):
        time.sleep(POLL_S)


def _end_in_order(
    supervisor: Supervisor, display: Display, interrupts: StopSignal, patience_s: float, reason: str
) -> None:
    """Ask the broker to end the run, wait as `_stop` says, then end what is left; a second Ctrl-C does so at once."""
    asked, deadline = False, time.monotonic() + ORDERLY_S
    while interrupts.count < 2 and not supervisor.wait(POLL_S):
        display.refresh()
        asked = asked or display.ask_to_stop(reason)
        gone = [supervisor.left(name) for name in ("broker", "learner")]
        if asked and not any(gone) and display.broker_silent_s() < patience_s:
            deadline = time.monotonic() + ORDERLY_S
        elif all(gone) or time.monotonic() > deadline:
            break
    supervisor.end(term_s=TERM_S)


def _conclude(supervisor: Supervisor, display: Display, folder: Path) -> int:
    failure = supervisor.failure
    if failure is not None:
        sys.stderr.write(f"error: {failure.worker}: {failure.message}\n(more in {failure.log})\n")
        return failure.code if failure.code > 0 else 1
    display.say_where()
    display.print_summary(folder)
    return 0
