"""`slipstream stop`: end a run in order, wherever its processes run.

Invariant: it only asks; the broker tells everybody, waits for the learner's last checkpoint, and leaves last.
"""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.workers import JoinOption, KeysOption


def stop(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Run folder or name.")] = None,
    join: JoinOption = None,
    keys: KeysOption = None,
) -> None:
    """Stop a run in order: actors hand back their work, the learner finishes its step and writes a checkpoint.

    Returns when the broker has heard it; the run then takes the time that its checkpoint takes.
    """
    from common.errors import UserError
    from common.messages import Stop
    from deploy.watch import find_target

    if (run is None) == (join is None):
        raise UserError("give either RUN or --join HOST:PORT.")
    find_target(run, join, keys).ask(Stop(reason="slipstream stop"))
    again = run if run is not None else f"--join {join}"
    typer.echo(
        "stopping: the learner finishes its step and writes a checkpoint, then all processes exit; "
        f"`slipstream status {again}` shows what is still pending"
    )
