"""`slipstream study NAME`: one of the paper's experiments, with a progress bar and a verdict."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import UserError

if TYPE_CHECKING:
    from studies.study import Setting, Study
    from studies.verdict import Verdict

OUT = Path("studies/out")


def study(
    name: Annotated[str, typer.Argument(help="Name of a study, or `list`.")],
    full: Annotated[bool, typer.Option("--full", help="The paper's models and sets, on GPUs.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions; default: the study's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all results; each study has its own inside.")] = OUT,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores at hand.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget earlier rows and begin again.")] = False,
    track: Annotated[bool, typer.Option(help="Send figure and report to MLflow.")] = True,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible server of the model to analyse (with --full)."),
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server of a judge model.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="Name of the judge model.")] = "gpt-4o-mini-2024-07-18",
    publish: Annotated[
        Path | None, typer.Option(help="Folder docs/ of a checkout: take figure and verdict into paper.md.")
    ] = None,
) -> None:
    """Reproduce a finding of the paper: raw rows, a table, a figure and a verdict under studies/out/NAME."""
    from studies import STUDIES, find_study

    if name == "list":
        _list(list(STUDIES))
        return
    chosen = find_study(name)
    from studies.study import Budget, Setting

    setting = Setting(
        budget=Budget.FULL if full else Budget.MINIATURE,
        seeds=tuple(range(seeds or chosen.default_seeds)),
        out=out / (f"{name}-full" if full else name),
        zoo=out / "zoo",
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        judge=judge,
        judge_model=judge_model,
    )
    _check(setting)
    verdict = _carry_out(chosen, setting, jobs or len(os.sched_getaffinity(0)), fresh)
    _finish(chosen, setting, verdict, track, publish)


def _check(setting: Setting) -> None:
    if setting.endpoint is not None and not setting.endpoint_model:
        raise UserError("name the model that the endpoint serves", setting="--endpoint-model")
    if setting.endpoint is not None and not setting.full:
        raise UserError("a served model is analysed with the paper's sets: add --full", setting="--endpoint")


def _list(names: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from studies import find_study

    table = Table("study", "reproduces", "seeds")
    for name in names:
        found = find_study(name)
        table.add_row(name, found.shows, str(found.default_seeds))
    Console().print(table)


def _carry_out(study: Study, setting: Setting, jobs: int, fresh: bool) -> Verdict:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from studies.runner import run_study

    logging.basicConfig(level=logging.WARNING)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(study.name, total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{study.name}: {what}")

        return run_study(study, setting, jobs=jobs, fresh=fresh, progress=advance)


def _finish(study: Study, setting: Setting, verdict: Verdict, track: bool, publish: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from studies import report

    table = Table("expectation", "expected", "measured (95 % interval)", "verdict", title=study.name)
    for finding in verdict.findings:
        table.add_row(*report.screen_row(finding))
    console = Console()
    console.print(table)
    if track:
        report.upload(study, setting, verdict)
    if publish is not None:
        from studies.page import publish as take

        take(setting.out, publish)
    console.print(f"[bold]{verdict.outcome}[/bold]; rows, report and figure are in {setting.out}")
