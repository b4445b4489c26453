"""`slipstream units`: systemd units for one host of a run.

Invariant: what is written is complete (units, environment files, and for the broker's host the run folder) and
passes `systemd-analyze verify`; nothing is installed or started.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR, UserError
from deploy.check import RecipeArgument, SetOption

if TYPE_CHECKING:
    from common.recipe import Recipe
    from deploy.launch.layout import Share

TEMPLATES = {
    "broker": "broker.service",
    "learner": "learner.service",
    "actor": "actor@.service",
}


class Role(StrEnum):
    """What a host does."""

    broker = "broker"
    learner = "learner"
    actor = "actor"
    all = "all"


@dataclass(frozen=True)
class Host:
    """One host of a run.

    Attributes:
        role: what runs here.
        actors: instances of the actor unit that the target starts.
        output: folder of the units and their environment files.
        join: "HOST:PORT" of the broker; None: it is read from the run folder.
        user_manager: units of a user's own systemd instance instead of the system's.
        run_as: account of system units.
    """

    role: Role
    actors: int
    output: Path
    join: str | None = None
    user_manager: bool = False
    run_as: str = "root"

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers of this host."""
        return tuple(TEMPLATES) if self.role is Role.all else (self.role.value,)


def units(
    recipe: RecipeArgument,
    host_role: Annotated[Role, typer.Option(help="What this host does.")] = Role.all,
    output: Annotated[Path | None, typer.Option(help="Folder to write to; default: RUN/systemd.")] = None,
    user: Annotated[bool, typer.Option("--user", help="Units for your own systemd instance.")] = False,
    run_as: Annotated[str | None, typer.Option(help="Account of system units; default: yours.")] = None,
    actors: Annotated[
        int | None, typer.Option(min=0, help="Actors of this host; default: actor.count.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The broker, where this host does not see the run folder."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Write systemd units: broker, learner, actors, and a target that groups them. Installs nothing."""
    from common.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    loaded = load_recipe(recipe, [*(overrides or ()), f'run.root="{loaded.run.root.resolve()}"'])
    if run_as and user:
        raise UserError("units of a user's own instance run as that user: leave it out.", setting="--run-as")
    host = Host(
        role=host_role,
        actors=loaded.actor.count if actors is None else actors,
        output=(output or loaded.folder / "systemd").resolve(),
        join=join,
        user_manager=user,
        run_as=run_as or getpass.getuser(),
    )
    names = write_units(loaded, host)
    _explain(host, names)


def write_units(recipe: Recipe, host: Host, *, program: tuple[str, ...] | None = None) -> list[str]:
    """Write units and environment files of a host; returns the names of the units.

    Args:
        recipe: with an absolute `run.root`.
        host: what runs here.
        program: argument vector of `slipstream`, absolute; default: this installation's.

    Raises:
        UserError: the folder cannot be written, or the host has less than the recipe asks of it.
    """
    from deploy.folder import holds_a_run, prepare
    from deploy.preflight import preflight

    if "broker" in host.workers:
        if host.join:
            raise UserError("this host runs the broker itself: leave it out.", setting="--join")
        preflight(recipe, ports=False, memory=host.role is Role.all)  # a broker needs little
        if not holds_a_run(recipe.folder):
            prepare(recipe, resume=False, fresh=False)
    files = _render(recipe, host, program) | _environments(recipe, host)
    try:
        host.output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (host.output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{host.output}': {error.strerror}.", setting="--output") from None
    return [name for name in files if name.endswith((".service", ".target"))]


def _render(recipe: Recipe, host: Host, program: tuple[str, ...] | None) -> dict[str, str]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # unit files, not HTML
    )
    values = _values(recipe, host, program)
    wanted = {f"slipstream-{TEMPLATES[worker]}": TEMPLATES[worker] for worker in host.workers}
    wanted["slipstream.target"] = "slipstream.target"
    return {
        unit: environment.get_template(f"{name}.jinja").render(values).lstrip("\n")
        for unit, name in wanted.items()
    }


def _values(recipe: Recipe, host: Host, program: tuple[str, ...] | None) -> dict[str, Any]:
    from deploy.launch.program import own_program

    folder = recipe.folder
    where = ["--join", host.join] if host.join else ["--run", str(folder)]
    if host.join and recipe.broker.keys:
        where += ["--keys", str(recipe.broker.keys.resolve())]
    return {
        "name": recipe.run.name,
        "program": quoted(program or own_program()),
        "recipe": quoted([str(folder / "recipe.toml")]),
        "join": quoted(where),
        "directory": escaped(str(Path.cwd())),
        "environment": escaped(str(host.output / "slipstream.env")),
        "learner_environment": escaped(str(host.output / "slipstream-learner.env")),
        "actor_environment": escaped(str(host.output / "slipstream-actor-")) + "%i.env",
        "writable": [quoted([str(recipe.run.root)]), quoted([f"-{_hub_cache()}"])],
        "run_as": host.run_as,
        "user_manager": host.user_manager,
        "with_broker": "broker" in host.workers,
        "ranks": recipe.learner.ranks,
        "actors": host.actors,
        "members": _members(host),
        "fatal_codes": (EXIT_USER_ERROR, EXIT_RUN_FAILED),
    }


def _members(host: Host) -> list[str]:
    members = [f"slipstream-{worker}.service" for worker in host.workers if worker != "actor"]
    if "actor" in host.workers:
        members += [f"slipstream-actor@{number}.service" for number in range(host.actors)]
    return members


def _environments(recipe: Recipe, host: Host) -> dict[str, str]:
    """Environment files: one for all workers, to be edited by people, and one per worker with its GPUs."""
    learner, actors = _shares(recipe, host)
    common = "# Environment of every worker on this host, for example NCCL_SOCKET_IFNAME=ib0 or HF_HOME=/data/hub\n"
    files = {"slipstream.env": f"{common}PYTHONUNBUFFERED=1\nSLIPSTREAM_LOG=INFO\n"}
    if "learner" in host.workers:
        files["slipstream-learner.env"] = _variables(learner)
    if "actor" in host.workers:
        files |= {f"slipstream-actor-{i}.env": _variables(share) for i, share in enumerate(actors)}
    return files


def _shares(recipe: Recipe, host: Host) -> tuple[Share, tuple[Share, ...]]:
    """Parts of this host for its learner and its actors, as the one-machine launcher shares them out."""
    from deploy.launch.layout import share_out
    from deploy.launch.machine import this_machine

    cores, gpus = this_machine()
    counted = recipe.actor.model_copy(update={"count": max(1, host.actors)})
    layout = (
        share_out(recipe.model_copy(update={"actor": counted}), cores, gpus)
        if host.role is Role.all
        else None
    )
    if layout is not None:
        return layout.learner, layout.actors
    return _alone(recipe, host, cores, gpus)


def _alone(recipe: Recipe, host: Host, cores: list[int], gpus: list[str]) -> tuple[Share, tuple[Share, ...]]:
    """Shares on a host that has only a learner or only actors: it takes GPUs from the first on."""
    from deploy.launch.layout import Share

    width = recipe.actor.tensor_parallel
    wanted = recipe.learner.ranks if host.role is Role.learner else width * host.actors
    if gpus and host.role is not Role.broker and wanted > len(gpus):
        raise UserError(f"{wanted} GPUs are asked for, and this host has {len(gpus)}.", setting="--host-role")
    threads = max(1, len(cores) // max(1, host.actors))
    actors = tuple(Share(None, threads, tuple(gpus[i * width : (i + 1) * width])) for i in range(host.actors))
    return Share(None, len(cores), tuple(gpus[: recipe.learner.ranks])), actors


def _variables(share: Share) -> str:
    return "".join(f"{name}={value}\n" for name, value in share.environment().items())


def _hub_cache() -> str:
    return os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")


def escaped(text: str) -> str:
    """Text in a unit file with systemd's own specifiers switched off."""
    if "\n" in text:
        raise UserError(f"{text!r} cannot stand in a unit file.", setting="--output")
    return text.replace("%", "%%")


def quoted(words: list[str] | tuple[str, ...]) -> str:
    """Words of a command line for ExecStart: quoted where they need it (systemd.service(5))."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    text = escaped(word).replace("$", "$$")
    if not any(c in text for c in " \t\"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _explain(host: Host, names: list[str]) -> None:
    manager = "systemctl --user" if host.user_manager else "systemctl"
    typer.echo(f"wrote {', '.join(names)} to {host.output}; edit slipstream.env there, then:")
    typer.echo(f"  {manager} link {host.output}/*.service {host.output}/*.target")
    typer.echo(f"  {manager} start slipstream.target")
    if host.user_manager:
        typer.echo("  loginctl enable-linger   # so that it runs while you are logged out")
