"""`slipstream grade`: score a file of responses, to check the reward on one's own data.

Invariant: one output line per input line, in order, whatever the line holds; a line that is no gradable record keeps
its fields and gets `"verdict": "invalid"` with the reason. Memory is bounded by a few lines per worker.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TextIO, cast

import typer

from common.errors import UserError

if TYPE_CHECKING:
    from common.verifier.extract import Template
    from common.verifier.grade import Level

INVALID = "invalid"
PROGRESS_S = 1.0
RAW_CHARS = 1000  # of a line that is not even an object
Record = dict[str, Any]


def grade_file(
    path: str,
    output: str | None = None,
    level: str = "full",
    template: str = "auto",
    workers: int = 2,
    deadline_s: float = 2.0,
) -> Counter[str]:
    """Grades a JSONL file of `{"response", "gold"}` lines.

    Args:
        path: the file, or `-` for standard input.
        output: where the graded lines go; None or `-` for standard output.
        level: `fast` or `full`.
        template: `boxed`, `answer_tag`, `answer` or `auto`.
        workers: verifier processes.
        deadline_s: seconds per response.

    Returns:
        Number of lines per verdict.

    Raises:
        UserError: the input cannot be read, the output cannot be written, or an option is wrong.
    """
    from common.verifier import VerifierPool

    with ExitStack() as stack:
        source = _source(path, stack)
        pool = stack.enter_context(
            VerifierPool(workers, deadline_s, cast("Level", level), cast("Template", template))
        )
        sink = _sink(path, output, stack)
        counts: Counter[str] = Counter()
        progress = _Progress()
        for record in _graded(source, pool):
            sink.write(_dumped(record) + "\n")
            counts[record["verdict"]] += 1
            progress.update(counts)
        sink.flush()
    return counts


def _source(path: str, stack: ExitStack) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    try:
        return stack.enter_context(open(path, "rb"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", setting="FILE") from error


def _sink(path: str, output: str | None, stack: ExitStack) -> TextIO:
    if output is None or output == "-":
        return sys.stdout
    if path != "-" and Path(output).exists() and Path(output).samefile(path):
        raise UserError(f"{output} is the input file, which would be lost", setting="--out")
    try:
        return stack.enter_context(open(output, "w", encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}", setting="--out") from error


def _graded(lines: Iterable[bytes], pool: Any) -> Iterator[Record]:
    """The records with verdicts; broken lines pass by the pool and keep their place."""
    waiting: deque[tuple[Record, bool]] = (
        deque()
    )  # read ahead of the pool's next verdict; whether it is gradable

    def pairs() -> Iterator[tuple[str, Any]]:
        for line in lines:
            record, reason = _record(line)
            waiting.append((record, reason is None))
            if reason is None:
                yield record["response"], record["gold"]
            else:
                _add(record, INVALID, None, 0.0, reason)

    for verdict in pool.grade_stream(pairs()):
        yield from _broken(waiting)
        record, _ = waiting.popleft()
        _add(record, verdict.verdict.value, verdict.extracted, verdict.seconds, verdict.reason)
        yield record
    yield from _broken(waiting)


def _broken(waiting: deque[tuple[Record, bool]]) -> Iterator[Record]:
    """Takes the broken records from the head of the queue."""
    while waiting and not waiting[0][1]:
        yield waiting.popleft()[0]


def _add(record: Record, verdict: str, extracted: str | None, seconds: float, reason: str | None) -> None:
    record.update(verdict=verdict, extracted=extracted, seconds=round(seconds, 6))
    if reason is not None:
        record["reason"] = reason


def _record(line: bytes) -> tuple[Record, str | None]:
    """The line's object, and why it cannot be graded (None if it can)."""
    from common.verifier.grade import gold_texts

    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _raw(line), f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        return _raw(line), reason if line.strip() else "an empty line"
    if not isinstance(record, dict):
        return _raw(line), "not a JSON object"
    for field in ("response", "gold"):
        if field not in record:
            return record, f"no field {field!r}"
    if not isinstance(record["response"], str):
        return record, "the field 'response' is not a string"
    try:
        gold_texts(record["gold"])
    except UserError as error:
        return record, str(error)
    except RecursionError:
        return record, "the field 'gold' is nested too deeply"
    return record, None


def _raw(line: bytes) -> Record:
    return {"line": line.decode("utf-8", "replace").rstrip("\r\n")[:RAW_CHARS]}


def _dumped(record: Record) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can spell
        text = json.dumps(record)
    return text


class _Progress:
    """A counter on standard error: rewritten in place on a terminal, silent elsewhere until the end."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._live = sys.stderr.isatty()

    def update(self, counts: Counter[str]) -> None:
        now = time.monotonic()
        if self._live and now - self._shown >= PROGRESS_S:
            self._shown = now
            print(f"\rgraded {counts.total()}", end="", file=sys.stderr, flush=True)


def summary(counts: Counter[str]) -> str:
    """One sentence: how many lines got which verdict."""
    if not counts:
        return "no lines"
    parts = ", ".join(f"{n} {verdict} ({n / counts.total():.1%})" for verdict, n in counts.most_common())
    return f"{counts.total()} lines: {parts}"


def grade(
    file: Annotated[
        str, typer.Argument(help='JSONL file of {"response", "gold"} lines; `-` for standard input.')
    ],
    output: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Where the graded lines go; default: standard output."),
    ] = None,
    level: Annotated[
        str, typer.Option(help="`fast`, or `full` (as strict, finds more equalities).")
    ] = "full",
    template: Annotated[
        str,
        typer.Option(
            help="Where answers stand: `boxed`, `answer_tag` (after </think>), `answer` (the element alone), or `auto` (whichever there is)."
        ),
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Verifier processes.")] = 2,
    deadline: Annotated[float, typer.Option(help="Seconds per response; past it: `unverified`.")] = 2.0,
) -> None:
    """Grade responses against gold answers, to check the reward on your own data.

    Writes every line back with `verdict` (correct, wrong, unformatted, unverified, or invalid for a broken line),
    `extracted` and `seconds` added, in order; a summary goes to standard error.
    """
    try:
        counts = grade_file(file, output, level, template, workers, deadline)
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        raise typer.Exit(1) from None
    except OSError as error:
        raise UserError(f"cannot write the graded lines: {error.strerror}", setting="--out") from error
    print(f"\n{summary(counts)}" if sys.stderr.isatty() else summary(counts), file=sys.stderr)
