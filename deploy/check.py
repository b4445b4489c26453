"""`slipstream check`: what a recipe would do, without doing it.

Invariant: nothing is started and nothing written; everything printed is computed from the resolved recipe and
this machine. What needs the network and cannot be had is a note, not a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.model_files import ModelShape
    from common.recipe import Recipe

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
    from deploy.preflight import (
        check_addresses,
        check_disk,
        check_keys,
        check_memory,
        check_ports,
        check_reward,
        check_route,
        check_template,
        meant_for_gpus,
    )

    check_template(recipe)
    check_addresses(recipe)
    check_reward(recipe)
    check_ports(recipe)
    notes: list[tuple[str, str]] = []
    shape = _shape(recipe, notes)
    of_the_machine = [lambda: check_keys(recipe), lambda: check_route(recipe)]
    if shape:
        _note_of(lambda: check_disk(recipe, shape), notes)
        of_the_machine.append(lambda: check_memory(recipe, shape))
    for verify in of_the_machine:
        if meant_for_gpus(recipe):
            _note_of(verify, notes)
        else:
            verify()
    questions = _questions(recipe, notes)
    table = Table(title=f"Plan of {recipe.run.name}", show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in [*outline(recipe, shape, questions), *notes]:
        table.add_row(name, text)
    Console(markup=False).print(table)


def _note_of(verify: Callable[[], None], notes: list[tuple[str, str]]) -> None:
    """A defect of this machine, not of the recipe: said, and a defect only for `slipstream run`."""
    from common.errors import UserError

    try:
        verify()
    except UserError as error:
        notes.append(("note", f"`slipstream run` refuses it on this machine: {error}"))


def _shape(recipe: Recipe, notes: list[tuple[str, str]]) -> ModelShape | None:
    from common.errors import UserError
    from common.model_files import KNOWN_SHAPES, looks_like_hub_id
    from deploy.preflight import check_model

    try:
        return check_model(recipe)
    except UserError as error:
        if not looks_like_hub_id(recipe.model.path) or error.setting != "model.path":
            raise
        known = KNOWN_SHAPES.get(recipe.model.path)
        sizes = "its published sizes are used" if known else "its sizes are unknown"
        notes.append(("note", f"the hub does not give '{recipe.model.path}' from here: {sizes}"))
        return known


def _questions(recipe: Recipe, notes: list[tuple[str, str]]) -> int | None:
    from common.errors import UserError
    from common.tasks.sets import needs_network
    from deploy.preflight import check_questions

    try:
        return check_questions(recipe, lambda text: notes.append(("note", text)))
    except UserError as error:
        if not any(
            needs_network(spec, recipe.data.data_dir) for spec in (recipe.data.train, *recipe.eval.sets)
        ):
            raise
        notes.append(("note", f"question sets were not checked: {error}"))
        return None
