"""`slipstream units`: systemd units for one host of a run.

Invariant: what is written is complete (units, environment files, and for the broker's host the run folder) and
passes `systemd-analyze verify`; nothing is installed or started.
"""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import EXIT_RESTART, EXIT_RUN_FAILED, EXIT_USER_ERROR, UserError
from common.run_files import RECIPE_FILE
from deploy.check import RecipeArgument, SetOption
from deploy.systemd.environment import counted, environments, hub_cache
from deploy.systemd.host import TEMPLATES, Host, Role

if TYPE_CHECKING:
    from common.recipe import Recipe


def units(
    recipe: RecipeArgument,
    host_role: Annotated[
        list[Role] | None, typer.Option(help="What this host does; default: all. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the files; default: RUN/systemd/HOST.")] = None,
    user: Annotated[bool, typer.Option("--user", help="Units for your own systemd instance.")] = False,
    run_as: Annotated[str | None, typer.Option(help="Account of system units; default: yours.")] = None,
    actors: Annotated[
        int | None, typer.Option(min=0, help="Actors of this host; default: actor.count.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The broker, where this host does not see the run folder: broker.bind and broker.port.",
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Write systemd units: broker, learner, actors, and a target that groups them. Installs nothing."""
    from common.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    loaded = load_recipe(recipe, [*(overrides or ()), f'run.root="{loaded.run.root.resolve()}"'])
    if run_as and user:
        raise UserError(
            "cannot be combined with --user: user units already run under your account.", setting="--run-as"
        )
    host = Host(
        roles=tuple(host_role or [Role.all]),
        actors=loaded.actor.count if actors is None else actors,
        output=(out or loaded.folder / "systemd" / socket.gethostname()).resolve(),
        join=join,
        user_manager=user,
        run_as=run_as or getpass.getuser(),
    )
    names = write_units(loaded, host)
    _explain(loaded, host, names)


def write_units(recipe: Recipe, host: Host, *, program: tuple[str, ...] | None = None) -> list[str]:
    """Write units and environment files of a host; returns the names of the units.

    Args:
        recipe: with an absolute `run.root`.
        host: what runs here.
        program: argument vector of `slipstream`, absolute; default: this installation's.

    Raises:
        UserError: the folder cannot be written or holds units of other workers, the broker's address is none, or
            the host has less than the recipe asks of it.
    """
    from deploy.folder import holds_a_run, prepare
    from deploy.preflight import OF_THE_MACHINE, OF_THE_START, preflight

    _check_host(host)
    if "broker" in host.workers:
        elsewhere = () if host.shared else OF_THE_MACHINE
        preflight(counted(recipe, host), without=(*OF_THE_START, *elsewhere))
        if not holds_a_run(recipe.folder):
            prepare(recipe, resume=False, fresh=False)
    files = _render(recipe, host, program) | environments(recipe, host)
    try:
        host.output.mkdir(parents=True, exist_ok=True)
        if "learner" in host.workers:  # its checkpoints go there; what is absent cannot be made writable
            recipe.run.root.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if name.endswith(".env"):  # may hold a password or a token
                (host.output / name).touch(mode=0o600)
                (host.output / name).chmod(0o600)
            (host.output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{host.output}': {error.strerror}.", setting="--out") from None
    return [name for name in files if name.endswith((".service", ".target"))]


def _check_host(host: Host) -> None:
    if host.join is not None:
        if "broker" in host.workers:
            raise UserError("this host runs the broker itself: leave it out.", setting="--join")
        name, _, port = host.join.rpartition(":")
        if not name or not port.isdigit() or port == "0":
            raise UserError(f"'{host.join}' is not HOST:PORT.", setting="--join")
    others = [
        worker
        for worker, file in TEMPLATES.items()
        if worker not in host.workers and (host.output / f"slipstream-{file}").exists()
    ]
    if others:
        raise UserError(
            f"'{host.output}' holds a unit of the {others[0]}, which slipstream.target would not start any more: name "
            "all that this host does in one call (--host-role may be repeated), or another --out.",
            setting="--host-role",
        )


def _render(recipe: Recipe, host: Host, program: tuple[str, ...] | None) -> dict[str, str]:
    from deploy.templates import templates_in

    environment = templates_in(Path(__file__).parent)
    values = _values(recipe, host, program)
    wanted = {f"slipstream-{TEMPLATES[worker]}": TEMPLATES[worker] for worker in host.workers}
    wanted["slipstream.target"] = "slipstream.target"
    return {
        unit: environment.get_template(f"{name}.jinja").render(values).lstrip("\n")
        for unit, name in wanted.items()
    }


def _values(recipe: Recipe, host: Host, program: tuple[str, ...] | None) -> dict[str, Any]:
    from common.program import own_program

    folder = recipe.folder
    where = ["--join", host.join] if host.join else ["--run", str(folder)]
    if host.join and recipe.broker.keys:
        where += ["--keys", str(recipe.broker.keys.resolve())]
    return {
        "name": recipe.run.name,
        "program": quoted(program or own_program()),
        "recipe": quoted([str(folder / RECIPE_FILE)]),
        "join": quoted(where),
        "directory": escaped(str(Path.cwd())),
        "environment": escaped(str(host.output / "slipstream.env")),
        "learner_environment": escaped(str(host.output / "slipstream-learner.env")),
        "actor_environment": escaped(str(host.output / "slipstream-actor-")) + "%i.env",
        "writable": [quoted([f"-{path}"]) for path in (recipe.run.root, hub_cache(host))],
        "run_as": host.run_as,
        "user_manager": host.user_manager,
        "with_broker": "broker" in host.workers,
        "ranks": recipe.learner.ranks,
        "actors": host.actors,
        "members": _members(host),
        "fatal_codes": (EXIT_USER_ERROR, EXIT_RUN_FAILED),
        "restart_code": EXIT_RESTART,
    }


def _members(host: Host) -> list[str]:
    members = [f"slipstream-{worker}.service" for worker in host.workers if worker != "actor"]
    if "actor" in host.workers:
        members += [f"slipstream-actor@{number}.service" for number in range(host.actors)]
    return members


def escaped(text: str) -> str:
    """Text in a unit file with systemd's own specifiers switched off."""
    if "\n" in text:
        raise UserError(f"{text!r} cannot stand in a unit file.", setting="--out")
    return text.replace("%", "%%")


def quoted(words: list[str] | tuple[str, ...]) -> str:
    """Words of a command line for ExecStart: quoted where they need it (systemd.service(5))."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    text = escaped(word).replace("$", "$$")
    if not any(c in text for c in " \t\"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _explain(recipe: Recipe, host: Host, names: list[str]) -> None:
    from broker.fitness import is_loopback

    manager = "systemctl --user" if host.user_manager else "systemctl"
    typer.echo(f"wrote {', '.join(names)} to {host.output}; edit slipstream.env there, then:")
    typer.echo(f"  {manager} link {host.output}/*.service {host.output}/*.target")
    typer.echo(f"  {manager} start slipstream.target")
    if host.user_manager:
        typer.echo("  loginctl enable-linger   # so that it runs while you are logged out")
    if "broker" in host.workers and not is_loopback(recipe.broker.bind):
        address = (
            f"{recipe.broker.bind}:{recipe.broker.port or 'PORT, with broker.port = PORT in the recipe'}"
        )
        typer.echo(f"hosts that do not see the run folder: slipstream units ... --join {address}")
