"""What a study of the paper is: a finding, expectations with numbers, and pieces of work that give rows.

Invariant: a study decides nothing while it runs. Its units, their sizes and its expectations follow from the
setting alone, so that a run that is interrupted, resumed or spread over processes gives the same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from studies.verdict import Expectation, Row, Verdict, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Budget(StrEnum):
    """How large a study is run."""

    SECONDS = "seconds"  # the tests: every line runs, nothing is learnt
    MINIATURE = "miniature"  # MiniMath and tiny models, minutes on two cores
    FULL = "full"  # the paper's models and sets, GPUs


@dataclass(frozen=True)
class Setting:
    """Under what a study runs.

    Attributes:
        budget: its size.
        seeds: of the repetitions.
        out: folder of the study's results.
        zoo: folder in which base models are kept, shared by all studies.
        endpoint: address of an OpenAI-compatible server that serves the models to be analysed, or None.
        endpoint_model: name of the model there.
        judge: address of an OpenAI-compatible server with a judge model, or None for the rule-based judge.
        judge_model: name of the judge model.
    """

    budget: Budget
    seeds: tuple[int, ...]
    out: Path
    zoo: Path
    endpoint: str | None = None
    endpoint_model: str | None = None
    judge: str | None = None
    judge_model: str = "gpt-4o-mini-2024-07-18"

    @property
    def full(self) -> bool:
        """The paper's models and sets."""
        return self.budget is Budget.FULL


@dataclass(frozen=True)
class Unit:
    """A piece of work whose rows are kept or lost as a whole; `key` names it within the study.

    `alone`: it takes times, or uses all cores itself, so that nothing may run beside it.
    """

    key: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the report; `cells` has the header in its first row."""

    title: str
    cells: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right."""
        header, *body = self.cells
        rule = ("---", *("---:" for _ in header[1:]))
        lines = [markdown_row(row) for row in (header, rule, *body)]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


class Study(ABC):
    """One study. Subclasses hold no state: an instance is made wherever a unit runs.

    Attributes:
        name: what `slipstream study` calls it.
        shows: figures and tables of the paper (arXiv 2503.20783) that it reproduces.
        paper: what the paper says, in our words.
        miniature: what stands in for the paper's models and data.
        expectations: what we expect of the rows, with numbers.
        remark: what was tried and the probable reason where the miniature's verdict is not `confirmed`; written
            after the run, whose expectations it leaves alone.
        default_seeds: repetitions unless `--seeds` says otherwise.
    """

    name: ClassVar[str]
    shows: ClassVar[str]
    paper: ClassVar[str]
    miniature: ClassVar[str]
    expectations: ClassVar[tuple[Expectation, ...]]
    remark: ClassVar[str] = ""
    default_seeds: ClassVar[int] = 3

    def models(self, setting: Setting) -> Iterable[tuple[str, int]]:
        """(name, seed) of the base models of the zoo that the units need; trained before them."""
        return ()

    @abstractmethod
    def units(self, setting: Setting) -> Sequence[Unit]:
        """The work, in order."""

    @abstractmethod
    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        """Carry out one unit; rows hold JSON values. May run in a process of its own."""

    @abstractmethod
    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """What the report shows."""

    @abstractmethod
    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw the study's figure."""

    def judge(self, rows: Sequence[Row], *, full: bool = False) -> Verdict:
        """What the rows, of a full-size run or not, say about the expectations that such rows can measure."""
        return judge([stated for stated in self.expectations if stated.full or not full], rows)
