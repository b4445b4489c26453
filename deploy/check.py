"""`slipstream check`: what a recipe would do, without doing it.

Invariant: nothing is started and nothing written; everything printed is computed from the resolved recipe and
this machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

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
        bool, typer.Option(help="Print the complete recipe, defaults included, as TOML.")
    ] = False,
    questions: Annotated[bool, typer.Option(help="Also load the question sets (may ask the hub).")] = True,
    model: Annotated[bool, typer.Option(help="Also look at the model's files (may ask the hub).")] = True,
) -> None:
    """Check a recipe and print its plan: batch arithmetic, staleness bound, devices, ports, memory. Starts nothing."""
    from common.recipe import load_recipe, resolved_toml

    loaded = load_recipe(recipe, overrides or ())
    if resolved:
        typer.echo(resolved_toml(loaded), nl=False)
        return
    print_plan(loaded, questions=questions, model=model)


def print_plan(recipe, *, questions: bool, model: bool) -> None:
    """Print the plan of a loaded recipe as tables."""
    from rich.console import Console
    from rich.table import Table

    from common.telemetry import visible_gpus
    from deploy.launch.layout import share_out
    from deploy.preflight import (
        check_addresses,
        check_disk,
        check_model,
        check_ports,
        check_questions,
        check_reward,
        check_template,
    )

    check_template(recipe)
    check_addresses(recipe)
    check_reward(recipe)
    check_ports(recipe)
    shape = check_model(recipe) if model else None
    if shape:
        check_disk(recipe, shape)
    count = check_questions(recipe) if questions else None
    table = Table(title=f"Plan of {recipe.run.name}", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in _rows(recipe, shape, count, _layout_text(recipe, share_out, visible_gpus)):
        table.add_row(name, text)
    Console().print(table)


def _rows(recipe, shape, count: int | None, layout: str) -> list[tuple[str, str]]:
    batch, rollout = recipe.batch, recipe.rollout
    rows = [("folder", str(recipe.folder))]
    if shape:
        rows.append(("model", f"{recipe.model.path}: {shape.parameters:,} parameters, {recipe.model.dtype}"))
    rows += [
        (
            "questions",
            f"{recipe.data.train}{f' ({count:,})' if count else ''}, template {_short(recipe.data.template)}",
        ),
        (
            "step",
            f"{batch.questions_per_step} questions x {rollout.group_size} responses = {recipe.responses_per_step}, "
            f"in {batch.optimizer_steps} optimizer steps of N = {recipe.responses_per_optimizer_step}; "
            f"L = {recipe.normaliser:g} tokens",
        ),
        ("run", f"{recipe.run.steps} steps{_epochs(recipe, count)}"),
        (
            "staleness",
            f"at most {batch.max_staleness} versions: at most {(batch.max_staleness + 1) * batch.questions_per_step} "
            "groups in flight, buffered and taken",
        ),
        ("objective", _objective(recipe)),
        (
            "learner",
            f"{recipe.learner.ranks} ranks, ZeRO-{recipe.learner.zero_stage}, lr {recipe.learner.lr:g} {recipe.learner.schedule}",
        ),
        (
            "actors",
            f"{recipe.actor.count} x tensor parallel {recipe.actor.tensor_parallel}, {recipe.actor.max_sequences} sequences each",
        ),
        ("evaluation", _evaluation(recipe)),
        ("devices", layout),
        ("ports", _ports(recipe)),
    ]
    if shape:
        rows.append(("memory", _memory(recipe, shape)))
    return rows


def _short(text: str) -> str:
    return text if len(text) < 30 else repr(text[:27]) + "..."


def _epochs(recipe, count: int | None) -> str:
    if not count:
        return ""
    epochs = recipe.run.steps * recipe.batch.questions_per_step / count
    cap = f" (ends early, after {recipe.data.max_epochs})" if epochs > recipe.data.max_epochs else ""
    return f", {epochs:.2f} epochs{cap}"


def _objective(recipe) -> str:
    a = recipe.algorithm
    parts = [a.preset, f"anchor {a.anchor}", f"correction {a.correction}"]
    parts += [
        f"{name} {value}"
        for name, value in (("advantage", a.advantage), ("loss", a.loss), ("aggregation", a.aggregation))
        if value
    ]
    parts.append(f"KL {a.kl_beta:g}" if a.kl_beta else "no reference model")
    return ", ".join(parts)


def _evaluation(recipe) -> str:
    if not recipe.eval.sets:
        return "none (eval.sets is empty)"
    return f"every {recipe.eval.every} versions on {', '.join(recipe.eval.sets)}: greedy and {recipe.eval.samples} sampled"


def _layout_text(recipe, share_out, visible_gpus) -> str:
    layout = share_out(recipe, sorted(os.sched_getaffinity(0)), visible_gpus())
    if layout.device == "gpu":
        actors = "; ".join(",".join(a.gpus) for a in layout.actors)
        return f"GPUs: learner {','.join(layout.learner.gpus)}, actors {actors}"

    def cores(share):
        return "any" if share.cores is None else ",".join(map(str, share.cores))

    return f"CPU cores: learner {cores(layout.learner)}, actors {'; '.join(cores(a) for a in layout.actors)}"


def _ports(recipe) -> str:
    def port(number: int) -> str:
        return str(number) if number else "a free one"

    return f"broker {recipe.broker.bind}:{port(recipe.broker.port)}, metrics 127.0.0.1:{port(recipe.broker.metrics_port)}, weights {recipe.weights.bind}:{port(recipe.weights.port)}"


def _memory(recipe, shape) -> str:
    from common.telemetry import visible_gpus
    from deploy.memory import MIB, actor_memory, learner_memory

    device = "gpu" if visible_gpus() else "cpu"
    plans = (
        ("learner rank", learner_memory(recipe, shape)),
        ("actor rank", actor_memory(recipe, shape, device)),
    )
    lines = []
    for name, plan in plans:
        terms = ", ".join(f"{term} {size / MIB:,.0f}" for term, size in plan.terms.items() if size >= MIB)
        lines.append(f"{name} about {plan.total / MIB:,.0f} MiB ({terms})")
    return "\n".join(lines)


def write_resolved(recipe, folder: Path) -> None:
    """Keep the resolved recipe in the run folder."""
    from common.recipe import resolved_toml

    (folder / "recipe.toml").write_text(resolved_toml(recipe), encoding="utf-8")
