"""`slipstream status`: ask a running broker how it goes; of a run that has ended, show how it was in the end.

Invariant: everything shown comes from the broker, at the moment of asking or in the last point that it wrote.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.workers import JoinOption, KeysOption

if TYPE_CHECKING:
    from common.tracking.spool import Record
    from deploy.watch import Target

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
    groups: Annotated[
        bool, typer.Option("--groups", help="List the groups in flight and in the buffer.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="EPOCH:INDEX", help="Show one group, down to its responses."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole status as JSON.")] = False,
    keys: KeysOption = None,
) -> None:
    """Show how a run goes: step, reward, accuracy, rates, staleness, queue, who waits for whom."""
    from rich.console import Console

    from deploy.watch import find_target

    target = find_target(run, join, keys)
    console = Console(markup=False, emoji=False)  # responses and reasons have brackets of their own
    if group is not None:
        from deploy.inspect_group import show_group

        target.status()  # or says why not
        show_group(console, str(target.address), target.keys, group)
        return
    end = None if groups else _end(target)
    found = target.status(groups=groups) if end is None else end.values["final"]
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    elif ledger:
        console.print(_ledger_table(found["ledger"]))
    elif groups:
        console.print(_groups_table(found["groups"]))
    elif watch and end is None:
        _watch(console, target)
    else:
        from deploy.screen import screen

        console.print(screen(found, title=f"slipstream: {target.name}", ended=end and _ended(end)))


def _end(target: Target) -> Record | None:
    """The last point of a run that has ended, and that nobody serves again."""
    from broker.run_folder import is_served
    from deploy.folder import last_end

    if target.folder is None or is_served(target.folder):
        return None
    return last_end(target.folder)


def _ended(end: Record) -> str:
    status, reason = end.values["status"], end.values["reason"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.time))
    return f"{status} at {when}{'' if reason == status else f': {reason}'}"


def _watch(console: Any, target: Target) -> None:
    from rich.live import Live

    from common.errors import UserError
    from deploy.screen import screen

    title = f"slipstream: {target.name}"
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                live.update(screen(target.status(), title=title), refresh=True)
            except UserError:
                live.update(screen(None, title=title, note=f"no answer from {target.address}"), refresh=True)
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
