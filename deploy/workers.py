"""The workers of a run, each startable by hand: `slipstream broker | actor | learner | track`.

Invariant: whatever the launcher, Slurm or systemd starts is one of these verbs with options that a person
could type.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from common.errors import RunFailedError, UserError, report
from common.run_files import ADDRESS_FILE, RECIPE_FILE, SPOOL
from deploy.check import RecipeArgument, SetOption

JoinOption = Annotated[str | None, typer.Option("--join", metavar="HOST:PORT", help="Address of the broker.")]
RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="RUN", help="Run folder or name: the broker's address is read from it."),
]
KeysOption = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FOLDER", help="CURVE keys, needed when the broker is not on loopback."),
]
ASK_FOR_BROKER_S = 20.0
TRACKER_PATIENCE_S = 90.0
TRACKER_POLL_S = 0.1


def set_up_logging() -> None:
    """One line per event on standard error: time, level, name, text."""
    logging.basicConfig(
        level=os.environ.get("SLIPSTREAM_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def _find_broker(join: str | None, run: str | None, keys: Path | None) -> tuple[str, Path | None]:
    if (join is None) == (run is None):
        raise UserError("give either --join HOST:PORT or --run RUN.")
    if join is not None:
        return join, keys
    from common.wire import from_file
    from deploy.folder import find_folder, read_recipe

    folder = find_folder(str(run))
    # The file, not what it says now: a broker that is started again may have another port, or another node.
    address, keys = from_file(folder / ADDRESS_FILE), keys or read_recipe(folder).broker.keys
    _wait_for_broker(folder, address, keys)
    return address, keys


def _wait_for_broker(folder: Path, address: str, keys: Path | None) -> None:
    """Wait until the run's broker answers, for as long as the run has not ended: a queued job may hold it."""
    from deploy.folder import resume_command

    if _has_ended(folder):
        logging.getLogger("slipstream").warning(
            "the run in '%s' has ended; waiting %.0f s in case it is resumed",
            folder,
            ASK_FOR_BROKER_S,
        )
    while not _broker_answers(folder, address, keys):
        if _has_ended(folder):
            raise UserError(
                f"the run in '{folder}' has ended and has no broker; resume it with `{resume_command(folder)}`.",
                setting="--run",
            )
        logging.getLogger("slipstream").warning("still waiting for the broker of '%s'", folder)


def _broker_answers(folder: Path, address: str, keys: Path | None) -> bool:
    from common.messages import Goodbye
    from common.wire import BrokerUnreachable, RefusedError
    from deploy.folder import wait_for_address
    from deploy.watch import observer

    try:
        wait_for_address(folder, ASK_FOR_BROKER_S)
    except UserError:
        return False
    client = observer(address, keys)
    try:
        client.connect(ASK_FOR_BROKER_S)
        client.request(Goodbye(reason="the broker is there"), timeout_s=ASK_FOR_BROKER_S)
    except RefusedError:
        pass  # it is there; the worker itself hears and says why
    except BrokerUnreachable:
        return False
    finally:
        client.close()
    return True


def broker(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in this folder.")] = False,
    fresh: Annotated[bool, typer.Option(help="Set an earlier run of this name aside.")] = False,
    replay: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Serve the steps of this recorded run again, to a learner alone."),
    ] = None,
) -> None:
    """Run the broker: question ledger, trajectory buffer, journal. One per run; actors and the learner join it."""
    from broker.main import serve
    from common.keys import check_server
    from common.recipe import load_recipe
    from deploy.folder import find_folder, prepare

    set_up_logging()
    loaded = load_recipe(recipe, overrides or ())
    if loaded.broker.keys is not None:
        check_server(loaded.broker.keys)
    recorded = find_folder(replay) if replay else None
    folder = prepare(loaded, resume=resume, fresh=fresh)
    tracker = _start_tracker(folder)
    try:
        code = serve(loaded, run_folder=folder, resume=resume, replay=recorded)
        if _has_ended(folder):  # after an interruption the run goes on, and so does its tracking
            _await(tracker)
    finally:
        if tracker.poll() is None:
            tracker.kill()
    raise typer.Exit(code)


def _start_tracker(folder: Path) -> subprocess.Popen:
    from common.process import die_with_parent
    from common.program import own_program

    points = folder / SPOOL
    known = points.stat().st_size if points.exists() else 0
    return subprocess.Popen(
        [*own_program(), "track", str(folder), "--beyond", str(known)],
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )


def _has_ended(folder: Path) -> bool:
    """Whether the run's last point is its end, and nobody has prepared the folder to go on since."""
    from common.tracking.spool import read_spool

    newest = deque(read_spool(folder / SPOOL), maxlen=1)
    if not newest or newest[0].kind != "end":
        return False
    return (folder / RECIPE_FILE).stat().st_mtime <= newest[0].time


def _await(tracker: subprocess.Popen) -> None:
    try:
        tracker.wait(TRACKER_PATIENCE_S)
    except subprocess.TimeoutExpired:
        logging.getLogger("slipstream.broker").warning(
            "the tracker did not finish; `slipstream track` delivers later"
        )


def actor(
    join: JoinOption = None,
    run: RunOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this actor; default: host and process number.")
    ] = None,
    keys: KeysOption = None,
) -> None:
    """Run one actor: a vLLM engine that leases questions, samples, verifies and publishes. Joins and leaves at any time."""
    from actors.main import run_actor
    from common.process import leave

    set_up_logging()
    try:
        address, found_keys = _find_broker(join, run, keys)
        code = run_actor(address, name=name, keys=found_keys)
    except (UserError, RunFailedError) as error:
        code = report(error)
    leave(code)


def learner(
    join: JoinOption = None,
    run: RunOption = None,
    resume: Annotated[
        bool, typer.Option(help="Start from the newest complete checkpoint, if there is one.")
    ] = False,
    ranks: Annotated[
        int,
        typer.Option(
            min=1, help="Start this many ranks on this machine (under srun or torchrun: leave it at 1)."
        ),
    ] = 1,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Train alone on what a run recorded (`broker.record = true`), from its start."
        ),
    ] = None,
    keys: KeysOption = None,
) -> None:
    """Run the learner: takes groups, trains with DeepSpeed, pushes weights into the running actors."""
    from common.process import die_with_parent, leave

    set_up_logging()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # from the first line on: a killed torchrun leaves no rank that is still importing
    if replay is not None:
        from deploy.replay import start_replay

        run = str(start_replay(replay))
    address, found_keys = _find_broker(join, run, keys)
    if ranks > 1 and "RANK" not in os.environ:
        code = _run_ranks(ranks, address, found_keys, resume)
    else:
        code = _learn(address, found_keys, resume)
    if replay is not None and code == 0:
        from deploy.replay import say_trained

        say_trained(Path(str(run)))
    leave(code)


def _learn(address: str, keys: Path | None, resume: bool) -> int:
    from learner.main import run_learner

    try:
        return run_learner(address, resume=resume, keys=keys)
    except (UserError, RunFailedError) as error:
        return report(error)


def _run_ranks(ranks: int, address: str, keys: Path | None, resume: bool) -> int:
    from common.messages import Goodbye
    from common.program import own_program
    from common.wire import RefusedError
    from deploy.launch.ranks import run_ranks
    from deploy.watch import observer

    client = observer(address, keys)
    try:
        folder = Path(client.connect(None).folder)
        client.request(Goodbye(reason="knows the run folder"), timeout_s=None)
    except RefusedError as error:
        raise RunFailedError(f"the broker refused the learner: {error}") from None
    finally:
        client.close()
    program = [*own_program(), "learner", "--join", address]
    program += [*(["--resume"] if resume else []), *(["--keys", str(keys)] if keys else [])]
    return run_ranks(ranks, program, folder)


def track(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or name.")],
    beyond: Annotated[
        int | None,
        typer.Option(hidden=True, help="Of the broker's own: first wait for points beyond this byte."),
    ] = None,
) -> None:
    """Deliver a run's points to MLflow and write its summary and figure; the broker starts this by itself.

    By hand: for a run that MLflow did not get all of. It returns when the run has ended, or is served by nobody.
    """
    from deploy.folder import find_folder
    from deploy.track import track_run

    set_up_logging()
    found = find_folder(str(folder))
    # A run that was stopped ends with its last point: until the broker that goes on has written one, it seems over.
    while beyond and (found / SPOOL).stat().st_size <= beyond:
        time.sleep(TRACKER_POLL_S)
    raise typer.Exit(track_run(found, by_hand=beyond is None))
