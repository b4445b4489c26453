"""Findings: what was looked at, how it is, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from common.errors import SlipstreamError


class Level(StrEnum):
    """How bad a finding is."""

    ok = "ok"
    warning = "warning"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        topic: what was looked at, in one or two words.
        level: a problem keeps a run from working; a warning may.
        text: what was found.
        advice: what to do; empty when all is well.
    """

    topic: str
    level: Level
    text: str
    advice: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def ok(topic: str, text: str) -> Finding:
    """All is well."""
    return Finding(topic, Level.ok, text)


def warning(topic: str, text: str, advice: str) -> Finding:
    """May do harm."""
    return Finding(topic, Level.warning, text, advice)


def problem(topic: str, text: str, advice: str) -> Finding:
    """Keeps a run from working."""
    return Finding(topic, Level.problem, text, advice)


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Findings of each check in turn; one that fails is a finding too, and hides none of the others."""
    for topic, check in checks:
        try:
            yield from check()
        except SlipstreamError as error:
            yield problem(topic, str(error), "change the setting that the sentence names")
        except Exception as error:  # an examination must not end because one organ is odd
            yield warning(
                topic,
                f"could not be examined: {type(error).__name__}: {error}",
                "please report this with the whole output",
            )
