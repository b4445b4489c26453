"""`slipstream keys`: make and show the CURVE keys that guard a run's sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

keys = typer.Typer(
    help="CURVE keys: with them, connections are encrypted and only their holders can join a run.",
    no_args_is_help=True,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the keys (`broker.keys`).")]


@keys.command("init")
def init(folder: FolderArgument) -> None:
    """Make a new set of keys in FOLDER, readable by you alone."""
    from common.keys import make_keys

    make_keys(folder)
    typer.echo(f"Keys are in {folder}. Set broker.keys = '{folder}' in the recipe.")
    typer.echo(
        "Nodes that join need server.key and client.key_secret (slipstream actor --join HOST:PORT --keys FOLDER); "
        "server.key_secret stays on the broker's host."
    )


@keys.command("show")
def show(folder: FolderArgument) -> None:
    """Show the public keys in FOLDER: the broker's, and those of the clients that it admits."""
    from common.keys import public_keys

    table = Table("key", "public key (Z85)")
    for name, public in public_keys(folder).items():
        table.add_row(Text(name), Text(public))  # a key may hold what rich takes for markup: [sHQt^/Q0@+]
    Console().print(table)
