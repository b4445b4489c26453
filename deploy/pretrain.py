"""`slipstream pretrain RECIPE`: make a small base model on MiniMath text, with a progress bar and a report."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.recipe import find_recipe, load_toml_model
from deploy.check import SetOption
from learner.pretraining.recipe import PretrainRecipe

LINES = 20  # of progress in a log, where no bar can be drawn


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Pretraining recipe: a TOML file or a shipped one's name.")],
    overrides: SetOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
) -> None:
    """Train a small Qwen2-architecture base model on MiniMath text and print what it can do."""
    # torch and transformers take seconds to import: not before the recipe is known to be right.
    resolved = load_toml_model(PretrainRecipe, find_recipe(recipe), overrides or [])
    _quiet()
    from learner import pretrain as stage

    console = Console(markup=False)
    with _progress(console) as bar:
        task = bar.add_task("pretraining", total=resolved.train.steps, loss="", speed="")
        meter = _Meter()

        def advance(step: int, loss: float, tokens: int) -> None:
            meter.count(tokens)
            elapsed = bar.tasks[task].elapsed or 0.0
            doing = "pretraining" if step + 1 < resolved.train.steps else "sampling answers"
            speed = meter.speed(elapsed)
            bar.update(task, completed=step + 1, description=doing, loss=f"loss {loss:.3f}", speed=speed)
            if not console.is_terminal and (step + 1) % max(1, resolved.train.steps // LINES) == 0:
                console.print(f"{doing}: {step + 1} of {resolved.train.steps}, loss {loss:.3f}, {speed}")

        report = stage.pretrain(resolved, overwrite=overwrite, progress=advance)
    console.print(_table(report, resolved.probe.set, resolved.probe.template))
    console.print(f"saved to {report.out}")


def _quiet() -> None:
    """Transformers asks DeepSpeed for its accelerator on saving, and shows a bar for every file."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()


class _Meter:
    """Counts tokens for the speed column."""

    def __init__(self) -> None:
        self._tokens = 0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def speed(self, elapsed: float) -> str:
        return f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _table(report, probe_set: str, template: str) -> Table:
    table = Table(title=f"{report.parameters:,} parameters on {probe_set}, template {template}")
    table.add_column("family")
    table.add_column("pass@1 (T=1)", justify="right")
    for family, value in report.families.items():
        table.add_row(family, f"{value:.3f}")
    table.add_section()
    table.add_row("all", f"{report.pass1:.3f}")
    table.add_row("mean tokens", f"{report.mean_tokens:.1f}")
    table.add_row("truncated", f"{report.truncated:.3f}")
    return table
