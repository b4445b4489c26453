"""Answers on disk: one JSON line per question, appended as it is finished.

Invariant: a file holds answers under one set of settings only; a line is either whole or gone (a crash costs
the questions under way), and no question is answered twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

ANSWERS = "responses.jsonl"
SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Response:
    """One response: its text, its length, and what the verifier says.

    Attributes:
        text: as the verifier read it.
        tokens: length in tokens, with the stop token.
        finish: `stop` or `length`.
        verdict: one of the five verdicts; a response cut at the budget is still read here, but `finish` tells.
        extracted: the answer that was found, or None.
        reward: 1.0 for a correct answer, or what a custom reward gave.
    """

    text: str
    tokens: int
    finish: str
    verdict: str
    extracted: str | None
    reward: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A question of a set, and the responses to it."""

    set: str
    uid: str
    problem: str
    gold: Any
    responses: tuple[Response, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Set and uid name a question."""
        return self.set, self.uid


class AnswerFile:
    """`responses.jsonl` and `settings.json` in a folder, opened for appending.

    Args:
        folder: made when absent.
        settings: everything that an answer depends on (JSON values).

    Raises:
        UserError: the folder holds answers under other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _agree(folder / SETTINGS, json.loads(json.dumps(settings)))
            self._path = folder / ANSWERS
            self._path.touch()
            self.answers = {answer.key: answer for answer in self._read_whole_lines()}
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="--out") from None

    def _read_whole_lines(self) -> Iterator[Answer]:
        """Answers so far; whatever follows the last whole line is cut off."""
        good = 0
        with self._path.open("rb") as file:
            for line in file:
                answer = _parse(line)
                if answer is None:
                    break
                good += len(line)
                yield answer
        with self._path.open("r+b") as file:
            file.truncate(good)

    def append(self, answer: Answer) -> None:
        """Keep an answer; it survives a crash of this process from here on."""
        self._file.write(json.dumps(asdict(answer), ensure_ascii=True) + "\n")
        self._file.flush()
        self.answers[answer.key] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that are there."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
    if different:
        name = sorted(different)[0]
        raise UserError(
            f"'{path.parent}' holds answers with {name} = {there.get(name)!r}, not {settings.get(name)!r}: "
            "choose another folder.",
            setting="--out",
        )


def _parse(line: bytes) -> Answer | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        responses = tuple(Response(**response) for response in row.pop("responses"))
        return Answer(responses=responses, **row)
    except (ValueError, TypeError, KeyError):
        return None
