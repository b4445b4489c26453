"""`slipstream status`: ask a running broker how it goes.

Invariant: everything shown comes from the broker at the moment of asking.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.workers import JoinOption, KeysOption

PERIOD_S = 1.0


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run folder or name; default: the newest run.")
    ] = None,
    join: JoinOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep the screen up to date until Ctrl-C.")
    ] = False,
    ledger: Annotated[bool, typer.Option("--ledger", help="Print the sum of the ledger (I3).")] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List the groups in the buffer.")] = False,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="EPOCH:INDEX", help="Show one group, down to its responses."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole status as JSON.")] = False,
    keys: KeysOption = None,
) -> None:
    """Show how a run goes: step, reward, accuracy, rates, staleness, queue, who waits for whom."""
    from rich.console import Console

    from deploy.watch import ask_status

    address, keys, title = _where(run, join, keys)
    console = Console(markup=False, emoji=False)  # responses and reasons have brackets of their own
    if group is not None:
        from deploy.inspect_group import show_group

        show_group(console, address, keys, group)
        return
    found = ask_status(address, keys, groups=groups)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    elif ledger:
        console.print(_ledger_table(found["ledger"]))
    elif groups:
        console.print(_groups_table(found["groups"]))
    elif watch:
        _watch(console, address, keys, title)
    else:
        from deploy.screen import screen

        console.print(screen(found, title=title))


def _where(run: str | None, join: str | None, keys: Path | None) -> tuple[str, Path | None, str]:
    from common.errors import UserError
    from deploy.folder import find_folder, newest_folder, read_address, read_recipe

    if join is not None:
        return join, keys, f"slipstream: {join}"
    folder = find_folder(run) if run is not None else newest_folder()
    address = read_address(folder)
    if address is None:
        raise UserError(f"'{folder}' has no running broker (no broker.json).", setting="RUN")
    return address["address"], keys or read_recipe(folder).broker.keys, f"slipstream: {folder.name}"


def _watch(console: Any, address: str, keys: Path | None, title: str) -> None:
    from rich.live import Live

    from common.errors import UserError
    from deploy.screen import screen
    from deploy.watch import ask_status

    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                live.update(screen(ask_status(address, keys), title=title), refresh=True)
            except UserError:
                live.update(screen(None, title=title, note=f"no answer from {address}"), refresh=True)
            time.sleep(PERIOD_S)


def _ledger_table(counts: dict[str, Any]) -> Any:
    from rich.table import Table

    parts = ("in_flight", "buffered", "taken", "consumed", "filtered", "expired", "abandoned")
    table = Table(title="ledger (leases)", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for part in parts:
        table.add_row(part, str(counts[part]))
    table.add_section()
    table.add_row("sum", str(sum(counts[part] for part in parts)))
    table.add_row("leased", str(counts["leased"]))
    table.add_row("sum_ok", str(counts["sum_ok"]).lower())
    for reason, count in counts["abandoned_reasons"].items():
        table.add_row(f"abandoned: {reason}", str(count))
    return table


def _groups_table(groups: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    columns = ("group", "state", "actor", "lease", "step", "versions", "era", "reward", "tokens")
    table = Table(*columns)
    for row in groups:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    return table
