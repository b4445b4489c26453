"""`slipstream doctor`: examine this host, and say what to do about each finding.

Invariant: nothing is changed; the exit code is 1 exactly when something keeps a run from working.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import UserError
from deploy.check import SetOption
from deploy.workers import JoinOption, KeysOption

if TYPE_CHECKING:
    from common.recipe import Recipe
    from deploy.doctoring.findings import Finding

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Also look at what this recipe needs.")
    ] = None,
    overrides: SetOption = None,
    join: JoinOption = None,
    keys: KeysOption = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface to meet over, e.g. ib0; default: loopback.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Wait here for `slipstream doctor --meet` on another host."),
    ] = None,
    meet: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Meet a `slipstream doctor --listen` there.")
    ] = None,
    network: Annotated[
        bool, typer.Option(help="Let two processes meet over gloo (and NCCL, with two GPUs).")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine this host: versions, GPUs, ports, disk, shared memory, clock, network, hub, MLflow."""
    from common.recipe import load_recipe
    from deploy.doctoring.findings import examine

    if listen and meet:
        raise UserError("one host listens and the other meets: give one of them here.", setting="--meet")
    for option, address in (("--listen", listen), ("--meet", meet), ("--join", join)):
        _require_address(option, address)
    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    checks = [*host_checks(loaded), *network_checks(loaded, interface, listen, meet, network=network)]
    if join:
        checks.append(("clock", partial(_skew, join, keys or (loaded.broker.keys if loaded else None))))
    findings = list(examine(checks))
    _print(findings, as_json=as_json)
    raise typer.Exit(int(any(finding.level == "problem" for finding in findings)))


def _require_address(option: str, address: str | None) -> None:
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise UserError(f"'{address}' is not HOST:PORT.", setting=option)


def host_checks(recipe: Recipe | None) -> list[tuple[str, Callable[[], Iterable[Finding]]]]:
    """What is looked at on this host alone."""
    from common.telemetry import gpu_count
    from deploy.doctoring import machine, services, software

    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", software.check_python),
        ("packages", software.check_packages),
        ("gpu", partial(machine.check_gpus, recipe)),
        ("disk", partial(machine.check_disk, recipe)),
        ("shared memory", lambda: machine.check_shared_memory(gpus=gpu_count())),
        ("limits", machine.check_limits),
        ("clock", machine.check_clock_source),
        ("leftovers", machine.check_leftovers),
        ("hub", services.check_hub),
    ]
    if recipe is not None:
        looked_at = (
            ("recipe", services.check_recipe_texts),
            ("model", services.check_model),
            ("questions", services.check_questions),
            ("mlflow", services.check_mlflow),
        )
        checks += [(topic, partial(check, recipe)) for topic, check in looked_at]
    return checks


def network_checks(
    recipe: Recipe | None, interface: str | None, listen: str | None, meet: str | None, *, network: bool
) -> list[tuple[str, Callable[[], Iterable[Finding]]]]:
    """What is looked at on the way to other hosts."""
    from deploy.doctoring import network as net

    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [("host name", net.check_name)]
    if recipe is not None:
        checks += [("ports", partial(net.check_ports, recipe)), ("keys", partial(net.check_keys, recipe))]
    chosen = net.chosen_interface(interface)
    if listen or meet:
        checks += [
            (backend, partial(net.check_peer, listen, meet, chosen, backend)) for backend in net.backends(1)
        ]
    elif network:
        checks += [(backend, partial(net.check_meeting, chosen, backend)) for backend in net.backends(2)]
    return checks


def _skew(address: str, keys: Path | None) -> Iterable[Finding]:
    from deploy.doctoring.network import check_skew

    return check_skew(address, keys)


def _print(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([finding.plain() for finding in findings], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        text = escape(finding.text) + (f"\n[bold]→[/] {escape(finding.advice)}" if finding.advice else "")
        table.add_row(MARKS[finding.level], finding.topic, text)
    Console().print(table)
