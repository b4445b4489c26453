"""The launcher's display: one live screen on a terminal, one line now and then elsewhere.

Invariant: what went wrong is never scrolled away: events go to the log `run.log` and stay on the screen.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.recipe import Recipe
from common.run_files import FIGURE_FILE, SUMMARY_FILE
from common.tracking.delivery import tracking_view
from deploy.folder import newest_model
from deploy.report import Summary, read_summary
from deploy.screen import line, screen
from deploy.watch import Watcher, ask_to_stop

LINE_EVERY_S = 10.0


class Display:
    """Shows a run. Use as a context manager around the run; `refresh` as often as you like."""

    def __init__(self, recipe: Recipe, folder: Path, *, quiet: bool) -> None:
        self.folder = folder
        self._keys = recipe.broker.keys
        self._steps = recipe.run.steps
        self._title = f"slipstream: {recipe.run.name}"
        self._console = Console(markup=False, emoji=False)  # what others wrote may have brackets
        self._watcher = Watcher(folder, recipe.broker.keys)
        live = self._console.is_terminal and not quiet
        self._live = (
            Live(screen(None, title=self._title), console=self._console, auto_refresh=False) if live else None
        )
        self._next = 0.0
        self._said_step: object = None
        self._said_where = False

    def __enter__(self) -> Display:
        self._watcher.start()
        if self._live is not None:
            self._live.start()
        else:
            self._console.print(f"{self._title}: logs and results in {self.folder}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()
        self._watcher.stop()

    def refresh(self) -> None:
        """Draw again if it is time."""
        if time.monotonic() < self._next:
            return
        self._draw()
        self._next = time.monotonic() + (1.0 if self._live is not None else LINE_EVERY_S)

    def _draw(self) -> None:
        status = self._watcher.latest
        self._say_where((status or {}).get("tracking"))
        if self._live is not None:
            self._live.update(screen(status, title=self._title), refresh=True)
        elif status is not None and (status["step"], status["version"]) != self._said_step:
            self._said_step = (status["step"], status["version"])
            self._console.print(line(status), highlight=False, soft_wrap=True)

    def broker_silent_s(self) -> float:
        """Seconds since the broker last answered; 0 before its first answer."""
        answered = self._watcher.answered
        return 0.0 if answered is None else time.monotonic() - answered

    def say(self, text: str) -> None:
        """A sentence above the display, and in run.log."""
        self._console.print(text, highlight=False, soft_wrap=True)  # an address stays whole
        with (self.folder / "run.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @property
    def step(self) -> int | None:
        """The first step that was not committed when the broker answered last."""
        status = self._watcher.latest
        return status["step"] if status else None

    def ask_to_stop(self, reason: str) -> bool:
        """Ask the broker for an orderly end, for `reason`."""
        return ask_to_stop(self.folder, self._keys, reason)

    def _say_where(self, tracking: dict[str, Any] | None) -> None:
        """Where MLflow shows the run, once it is known."""
        if self._said_where or not tracking or not tracking["run"]:
            return
        self._said_where = True
        where = tracking["url"] or f"run {tracking['run']}; mlflow ui --backend-store-uri {tracking['uri']}"
        self.say(f"MLflow: {where}")

    def say_where(self) -> None:
        """The same at the end: a short run may be over before a status has told it."""
        self._say_where(tracking_view(self.folder))

    def print_summary(self, folder: Path) -> None:
        """The table at the end of a run."""
        summary = read_summary(folder)
        if summary is None:
            self._console.print(f"no summary was written; see {folder}")
            return
        self._console.print(_summary_table(summary, folder, self._steps))


def _why(summary: Summary, steps: int) -> str:
    """Why a run ended, where its status alone does not say it."""
    if summary["status"] == "finished" and summary["steps"] < steps:
        return f"its questions ran out before step {steps}: raise data.max_epochs, or give it more questions"
    return "" if summary["reason"] == summary["status"] else summary["reason"]


def _summary_table(summary: Summary, folder: Path, steps: int) -> Table:
    table = Table(title=f"{folder.name}: {summary['status']}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for key, value in summary.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    counts = ", ".join(f"{name} {count}" for name, count in summary["ledger"].items())
    table.add_row("ledger", counts)
    if why := _why(summary, steps):
        table.add_row("why it ended", why)
    if model := newest_model(folder):
        table.add_row("model", str(model))
    table.add_row("figure", str(folder / FIGURE_FILE))
    table.add_row("summary", str(folder / SUMMARY_FILE))
    return table
