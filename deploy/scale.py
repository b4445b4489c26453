"""`slipstream scale`: more or fewer actors while the run goes on.

Invariant: an actor that goes is asked first: it publishes what it has finished and hands back the rest. On Slurm
jobs are submitted and ended; elsewhere (one machine, systemd) the broker sends the surplus away, and nobody is
started whom this command could not look after.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError
from common.run_files import ADDRESS_FILE, SLURM_FOLDER, SLURM_STATE_FILE


def scale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or name.")],
    actors: Annotated[int, typer.Option(min=0, help="Target number of actors.")],
) -> None:
    """Change the number of actors of a run; the learner goes on meanwhile.

    On Slurm both ways. Elsewhere only downwards: a further actor is started where it shall run, with
    `slipstream actor --run RUN` or `--join HOST:PORT`.
    """
    from deploy.folder import find_folder

    folder = find_folder(run).resolve()
    if (folder / SLURM_FOLDER / SLURM_STATE_FILE).exists():
        from deploy.slurm.scale import scale_array

        typer.echo(scale_array(folder, actors))
    else:
        typer.echo(_send_away(folder, actors))


def _send_away(folder: Path, wanted: int) -> str:
    from common.messages import Drain
    from deploy.folder import read_address, read_recipe
    from deploy.watch import ask, ask_status

    found = read_address(folder)
    if found is None:
        raise UserError(f"'{folder}' has no running broker (no {ADDRESS_FILE}).", setting="RUN")
    address, keys = found["address"], read_recipe(folder).broker.keys
    going = surplus(ask_status(address, keys)["peers"], wanted)
    if not going:
        return f"actors: {wanted} wanted, {wanted} there: nothing to do"
    ask(address, keys, Drain(actors=going, reason=f"slipstream scale --actors {wanted}"))
    return f"actors: {wanted} wanted: {', '.join(going)} asked to leave after the work in hand"


def surplus(peers: Mapping[str, Mapping[str, Any]], wanted: int) -> list[str]:
    """Names of the actors that shall go: those that joined last; who is leaving already counts no more.

    Raises:
        UserError: there are fewer than `wanted`.
    """
    staying = [
        (peer["joined"], name)
        for name, peer in peers.items()
        if peer["role"] == "actor" and peer["alive"] and peer["state"] != "draining"
    ]
    if len(staying) < wanted:
        raise UserError(
            f"the run has {len(staying)} actors; without Slurm, start more on the host where they should run: "
            "slipstream actor --run RUN, or --join HOST:PORT from a host that does not see the run folder.",
            setting="--actors",
        )
    return [name for _, name in sorted(staying)[wanted:]]
