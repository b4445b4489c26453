"""The command line: one verb per thing a person does with a run.

Invariant: importing this module costs milliseconds (verbs import what they need when they are called), and
every mistake of the caller ends as one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer

from common.errors import RunFailedError, UserError, report

app = typer.Typer(
    name="slipstream",
    help="Asynchronous reinforcement learning for reasoning models: Dr. GRPO as a real system.\n\n"
    "Start with `slipstream check demo`, then `slipstream run demo`. Each verb explains itself with --help.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# verb -> (module, function, panel). A module holds its verb's options and texts.
VERBS: dict[str, tuple[str, str, str]] = {
    "run": ("deploy.run", "run", "A run on this machine"),
    "status": ("deploy.status", "status", "A run on this machine"),
    "stop": ("deploy.stop", "stop", "A run on this machine"),
    "check": ("deploy.check", "check", "A run on this machine"),
    "plan": ("deploy.plan", "plan", "A run on this machine"),
    "broker": ("deploy.workers", "broker", "Its workers, one by one"),
    "actor": ("deploy.workers", "actor", "Its workers, one by one"),
    "learner": ("deploy.workers", "learner", "Its workers, one by one"),
    "track": ("deploy.workers", "track", "Its workers, one by one"),
    "eval": ("deploy.eval", "evaluate", "Models and answers"),
    "grade": ("deploy.grade", "grade", "Models and answers"),
    "pretrain": ("deploy.pretrain", "pretrain", "Models and answers"),
    "study": ("deploy.study", "study", "Models and answers"),
    "serve": ("deploy.serve", "serve", "A cluster"),
    "submit": ("deploy.slurm.submit", "submit", "A cluster"),
    "scale": ("deploy.scale", "scale", "A cluster"),
    "units": ("deploy.systemd.units", "units", "A cluster"),
    "doctor": ("deploy.doctor", "doctor", "A cluster"),
    "keys": ("deploy.keys", "keys", "A cluster"),
}


def _register(verb: str, module: str, function: str, panel: str) -> None:
    loaded = importlib.import_module(module)
    command: Any = getattr(loaded, function)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=verb, rich_help_panel=panel)
    else:
        app.command(verb, rich_help_panel=panel)(command)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"slipstream {version('slipstream-rl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The verb that is called is the only one that is loaded; help shows them all.
    wanted = [arguments[0]] if arguments and arguments[0] in VERBS else list(VERBS)
    for verb in wanted:
        _register(verb, *VERBS[verb])
    try:
        app(args=arguments)
    except (UserError, RunFailedError) as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
