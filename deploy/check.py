"""`slipstream check`: what a recipe would do, without doing it.

Invariant: nothing is started and nothing written; everything printed is computed from the resolved recipe and
this machine. What needs the network and cannot be had is a note, not a failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.errors import UserError
    from common.recipe import Recipe
    from deploy.preflight import Subject

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe (`demo`).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Replace one setting, e.g. `--set learner.lr=2e-6`. Repeatable."
    ),
]


def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the complete recipe, defaults included, as TOML.")
    ] = False,
) -> None:
    """Check a recipe and print its plan: batch arithmetic, staleness bound, devices, ports, memory. Starts nothing."""
    from common.recipe import load_recipe, resolved_toml

    loaded = load_recipe(recipe, overrides or ())
    if resolved:
        typer.echo(resolved_toml(loaded), nl=False)
        return
    _print(loaded)


def _print(recipe: Recipe) -> None:
    from rich.console import Console
    from rich.table import Table

    from deploy.outline import outline
    from deploy.preflight import Subject, examine

    notes: list[tuple[str, str]] = []
    subject = Subject(recipe, lambda text: notes.append(("note", text)))
    examine(subject, _tolerate)
    table = Table(title=f"Plan of {recipe.run.name}", show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in [*outline(recipe, subject.shape, subject.questions), *notes]:
        table.add_row(name, text)
    Console(markup=False).print(table)


def _tolerate(name: str, error: UserError, subject: Subject) -> None:
    """Note what is a defect of this machine or of its network, and not of the recipe; raise everything else."""
    from deploy.preflight import OF_THE_MACHINE, meant_for_gpus

    if name == "model":
        _take_published_sizes(error, subject)
    elif name == "questions":
        _leave_sets_unread(error, subject)
    elif name in ("disk", "host") or (name in (*OF_THE_MACHINE, "keys") and meant_for_gpus(subject.recipe)):
        subject.note(f"`slipstream run` refuses it on this machine: {error}")
    else:
        raise error


def _take_published_sizes(error: UserError, subject: Subject) -> None:
    from common.model_files import KNOWN_SHAPES, looks_like_hub_id

    model = subject.recipe.model.path
    if not looks_like_hub_id(model) or error.setting != "model.path":
        raise error
    subject.shape = KNOWN_SHAPES.get(model)
    sizes = "its published sizes are used" if subject.shape else "its sizes are unknown"
    subject.note(f"the hub does not give '{model}' from here: {sizes}")


def _leave_sets_unread(error: UserError, subject: Subject) -> None:
    from common.tasks.sets import needs_network

    data = subject.recipe.data
    if not any(needs_network(spec, data.data_dir) for spec in (data.train, *subject.recipe.eval.sets)):
        raise error
    subject.note(f"question sets were not checked: {error}")
