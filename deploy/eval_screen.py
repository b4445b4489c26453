"""An evaluation on the screen: progress while it runs, a table at the end, files beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from actors.engine import Engine
from actors.offline_eval import EvalPlan, Question, answer_all, unanswered
from common.evaluation import Answer, AnswerFile, Report, summarise

TABLE_JSON, TABLE_MARKDOWN = "table.json", "table.md"


def run_with_progress(plan: EvalPlan, questions: Sequence[Question], folder: Path) -> Report:
    """Answer what is not answered yet; write the table beside the answers and return the report."""
    console = Console(stderr=True)
    file = AnswerFile(folder, plan.settings)
    try:
        left = unanswered(questions, file)
        if len(left) < len(questions):
            console.print(f"{len(questions) - len(left)} of {len(questions)} questions are answered already")
        if left:
            _answer(plan, left, file, console)
    finally:
        file.close()
    report = summarise((file.answers[question.key] for question in questions), seed=plan.seed)
    (folder / TABLE_JSON).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (folder / TABLE_MARKDOWN).write_text(report.markdown(), encoding="utf-8")
    return report


def _answer(plan: EvalPlan, left: Sequence[Question], file: AnswerFile, console: Console) -> None:
    console.print(f"starting vLLM on {plan.model}")
    engine = Engine(**plan.engine_arguments)  # before the progress bar, which has a thread
    try:
        with _progress(console) as bar:
            task = bar.add_task("answering", total=len(left), tokens="")
            tokens = 0

            def on_answer(answer: Answer) -> None:
                nonlocal tokens
                tokens += sum(response.tokens for response in answer.responses)
                elapsed = bar.tasks[task].elapsed or 0.0
                speed = f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
                bar.update(task, advance=1, tokens=speed)

            asyncio.run(answer_all(plan, engine, left, file, on_answer))
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {len(file.answers)} answers")
        raise
    finally:
        engine.shutdown()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=console,
    )


def show(report: Report, folder: Path) -> None:
    """Print the table (as much as fits a screen; the files have all of it) and where everything is."""
    header, *rows = report.rows()
    tries = [name for name in header if name.startswith("pass@")]
    hidden = {"longest", "unverified", *tries[:-1]}
    shown = [index for index, name in enumerate(header) if name not in hidden]
    table = Table()
    for index in shown:
        table.add_column(header[index], justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*(row[index] for index in shown))
    table.add_section()
    table.add_row(*(rows[-1][index] for index in shown))
    console = Console(markup=False)
    console.print(table)
    console.print(f"answers and table: {folder}")
