"""Question sets: MiniMath by name, the paper's sets by name, or any local file, folder or hub data set.

Invariant: whatever the source, a loaded row has a unique `uid`, a non-empty `problem` and a gold `answer`
(string, number, or list of which any is accepted); anything else is refused with the row and the field.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.hub import prepare_hub
from common.tasks import minimath

Answer = str | int | float | list
Row = dict[str, Any]
DATA_VARIABLE = "SLIPSTREAM_DATA"
_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_KEPT = ("level", "family", "subject", "solution", "source", "difficulty")


@dataclass(frozen=True)
class QuestionSet:
    """Loaded questions; rows are dicts with at least `uid`, `problem`, `answer`."""

    name: str
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class MissingFieldError(UserError):
    """A row lacks the field with its question or its gold answer.

    Attributes:
        role: "problem" or "answer".
    """

    def __init__(self, message: str, role: str) -> None:
        super().__init__(message)
        self.role = role


@dataclass(frozen=True)
class PaperSet:
    """Where a set of the paper lives (paper section 1.4).

    `files` are the stems looked for in the local data folder; `answer_after` cuts the gold answer out of a
    longer text (GSM8K writes `#### 42` at the end of its solutions).
    """

    about: str
    files: tuple[str, ...]
    hub: str
    split: str = "train"
    config: str | None = None
    problem: str = "problem"
    answer: str = "answer"
    answer_after: str | None = None


# The copies by the paper's own authors where they exist; the five benchmarks are splits of one data set.
_SUITE = "lkevinzc/math-eval"
PAPER_SETS: dict[str, PaperSet] = {
    # The paper's file joins GSM8K's train and test rows (8,792): training on it contaminates the test set.
    "gsm8k": PaperSet(
        "grade-school word problems, train rows only",
        ("gsm8k_train", "gsm8k"),
        "openai/gsm8k",
        config="main",
        problem="question",
        answer_after="####",
    ),
    "asdiv": PaperSet("single-step word problems", ("asdiv_2k", "asdiv"), "axon-rl/ASDIV-2k"),
    "math_12k": PaperSet("MATH, 12,000 problems", ("math_12k",), "axon-rl/MATH-12k"),
    "math_lvl3to5_8k": PaperSet("MATH, levels 3-5", ("math_lvl3to5_8k",), "axon-rl/MATH-lvl3to5-8k"),
    "orz_57k": PaperSet("Open-Reasoner-Zero, 57k problems", ("orz_57k",), "axon-rl/ORZ-57k"),
    "big_math": PaperSet(
        "Big-Math-RL-Verified",
        ("big_math",),
        "open-r1/Big-Math-RL-Verified-Processed",
        config="all",
        problem="prompt",
        answer="solution",
    ),
    "aime": PaperSet("AIME 2024, 30 problems", ("aime24", "aime"), _SUITE, split="aime"),
    "amc": PaperSet("AMC, 83 problems", ("amc23", "amc"), _SUITE, split="amc"),
    "math500": PaperSet("MATH-500", ("math500",), _SUITE, split="math"),
    "minerva": PaperSet("Minerva, 272 problems", ("minerva",), _SUITE, split="minerva"),
    "olympiad_bench": PaperSet(
        "OlympiadBench, 675 problems", ("olympiad_bench",), _SUITE, split="olympiad_bench"
    ),
}
BENCHMARKS = ("aime", "amc", "math500", "minerva", "olympiad_bench")


def known_sets() -> tuple[str, ...]:
    """Every name that `load_questions` knows without a path or hub id."""
    return (*minimath.SETS, *PAPER_SETS)


def load_questions(
    spec: str,
    *,
    data_dir: str | Path | None = None,
    split: str = "train",
    problem_field: str | None = None,
    answer_field: str | None = None,
    levels: Iterable[int] | None = None,
    limit: int | None = None,
    all_fields: bool = False,
) -> QuestionSet:
    """Loads a question set.

    Args:
        spec: a MiniMath or paper name (`known_sets()`), a local `.jsonl` / `.parquet` / `.arrow` file or a
            folder written by `datasets`, or a hub id (`owner/name`, or `config@owner/name`).
        data_dir: folder searched for a paper set before the hub; default: the variable SLIPSTREAM_DATA.
        split: split of a hub id or of a folder that has several.
        problem_field: field with the question; default `problem`.
        answer_field: field with the gold answer; default `answer`.
        levels: keep only rows of these levels (of `level`: a number, or text such as `Level 3`).
        limit: keep only the first rows, after the filter.
        all_fields: keep every field that a message can hold, for a reward of one's own; else those that we know.

    Raises:
        UserError: unknown name, missing file or field, unusable row, no network, or nothing left.
        MissingFieldError: a row lacks a field.
    """
    if spec in minimath.SETS:
        rows: Iterable[Row] = (asdict(q) for q in minimath.minimath(spec))
        return _finish(spec, rows, levels, limit)
    if spec in PAPER_SETS:
        raw, paper = _open_paper_set(spec, data_dir)
        problem, answer = problem_field or paper.problem, answer_field or paper.answer
        rows = _checked(spec, raw, problem, answer, paper.answer_after, all_fields)
    else:
        raw = _open_path(Path(spec), split) if _is_local(spec) else _open_hub(spec, split)
        names = problem_field or "problem", answer_field or "answer"
        rows = _checked(Path(spec).name, raw, *names, None, all_fields)
    return _finish(spec, rows, levels, limit)


def doubtful_golds(questions: Iterable[Row]) -> list[str]:
    """What is odd about the gold answers of a set, as phrases with a count: some can never be right as they stand."""
    rows = list(questions)
    empty = sum(str(row["answer"]).strip() == "" for row in rows)
    worked = sum("####" in str(row["answer"]) for row in rows)
    phrases = []
    if empty:
        phrases.append(
            f"{empty:,} of {len(rows):,} gold answers are empty: only an empty answer equals these"
        )
    if worked:
        phrases.append(
            f"{worked:,} of {len(rows):,} gold answers contain '####', as GSM8K's solutions do: keep only what "
            "follows it"
        )
    return phrases


def needs_network(spec: str, data_dir: str | Path | None = None) -> bool:
    """Whether a set can only come from the hub: a hub id, or a paper set that the data folder lacks."""
    if spec in PAPER_SETS:
        folder = data_dir or os.environ.get(DATA_VARIABLE)
        return folder is None or not any(_candidates(Path(folder), PAPER_SETS[spec].files))
    return spec not in minimath.SETS and not _is_local(spec) and spec.count("/") == 1


def _finish(name: str, rows: Iterable[Row], levels: Iterable[int] | None, limit: int | None) -> QuestionSet:
    wanted = None if levels is None else set(levels)
    kept: list[Row] = []
    empty = True
    for row in rows:
        empty = False
        if limit is not None and len(kept) >= limit:
            break
        if wanted is None or row.get("level") in wanted:
            kept.append(row)
    if not kept:
        why = "holds no question" if empty else "has no question of the levels that are asked for"
        raise UserError(f"question set '{name}' {why}")
    return QuestionSet(name, tuple(kept))


def _open_paper_set(name: str, data_dir: str | Path | None) -> tuple[Iterable[Mapping[str, Any]], PaperSet]:
    """Rows of a paper set and how to read them: a local copy is expected to use the default field names."""
    paper = PAPER_SETS[name]
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    if folder is not None:
        for candidate in _candidates(Path(folder), paper.files):
            return _open_path(candidate, paper.split), PaperSet(paper.about, paper.files, paper.hub)
    try:
        return _open_hub(paper.hub, paper.split, paper.config), paper
    except UserError as error:
        names = ", ".join(f"{stem}.jsonl" for stem in paper.files)
        raise UserError(f"{error} (data_dir or {DATA_VARIABLE} may name a folder with {names})") from error


def _candidates(folder: Path, stems: tuple[str, ...]) -> Iterator[Path]:
    for stem in stems:
        for path in (folder / stem, *(folder / f"{stem}{suffix}" for suffix in _SUFFIXES)):
            if path.exists():
                yield path


def _is_local(spec: str) -> bool:
    looks_like_path = spec.endswith(_SUFFIXES) or spec.startswith((".", "/", "~")) or spec.count("/") > 1
    return looks_like_path or Path(spec).exists()


def _open_path(path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"question set '{path}' does not exist")
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix in (".jsonl", ".json"):
        return _read_json_lines(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"question set '{path}': unknown kind of file; valid ones: {', '.join(_SUFFIXES)}")
    import datasets

    read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_file
    return _guarded(str(path), lambda: read(str(path)))


def _read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    """Read directly, because Arrow columns would refuse answers of mixed types."""
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"question set '{path}', line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"question set '{path}', line {number}: not a JSON object")
        rows.append(row)
    return rows


def _open_folder(path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """A folder saved by `Dataset.save_to_disk` / `DatasetDict.save_to_disk`."""
    import datasets

    loaded = _guarded(str(path), lambda: datasets.load_from_disk(str(path)))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"question set '{path}' has no split '{split}'; it has {', '.join(loaded)}")
        return loaded[split]
    return loaded


def _open_hub(spec: str, split: str, config: str | None = None) -> Iterable[Mapping[str, Any]]:
    config_part, _, repository = spec.rpartition("@")
    if repository.count("/") != 1:
        raise UserError(
            f"unknown question set '{spec}'; valid ones: {', '.join(known_sets())}, a local file, or a hub id"
        )
    prepare_hub()
    import datasets

    return _guarded(repository, lambda: datasets.load_dataset(repository, config_part or config, split=split))


def _guarded(name: str, load: Any) -> Any:
    """Runs a loader of `datasets`; its many exceptions become one sentence."""
    try:
        return load()
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"question set '{name}' cannot be loaded ({type(error).__name__}: {first_line}); "
            "without a network give a local path"
        ) from error


def _checked(
    name: str,
    raw: Iterable[Mapping[str, Any]],
    problem: str,
    answer: str,
    answer_after: str | None,
    all_fields: bool,
) -> Iterator[Row]:
    for index, source in enumerate(raw):
        for role, wanted in (("problem", problem), ("answer", answer)):
            if wanted not in source:
                raise MissingFieldError(
                    f"question set '{name}', row {index}: no field '{wanted}'; it has {', '.join(source)}",
                    role,
                )
        text, gold = source[problem], source[answer]
        if isinstance(gold, str) and answer_after is not None:
            gold = gold.rpartition(answer_after)[2].strip()
        _check_values(name, index, problem, text, answer, gold)
        row: Row = {"uid": f"{name}/{index}", "problem": text, "answer": _sendable(gold)}
        more = [key for key in source if _is_plain(source[key])] if all_fields else _KEPT
        row.update({key: _sendable(source[key]) for key in more if key in source and key not in row})
        if "level" in row:
            row["level"] = _level(row["level"])
        yield row


def _check_values(name: str, index: int, problem: str, text: Any, answer: str, gold: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"question set '{name}', row {index}: field '{problem}' is not a question text")
    golds = gold if isinstance(gold, list) and gold else [gold]
    if not all(isinstance(g, str) or _is_number(g) for g in golds):
        raise UserError(
            f"question set '{name}', row {index}: field '{answer}' is not a string, a finite number or a list of these"
        )


def _is_number(gold: Any) -> bool:
    if isinstance(gold, float):
        return math.isfinite(gold)
    return isinstance(gold, int) and not isinstance(gold, bool)


def _is_plain(value: Any) -> bool:
    """Whether a message can hold a value: JSON's types, and no number that is not finite."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return value is None or isinstance(value, str | bool | int) or _is_number(value)


def _sendable(value: Any) -> Any:
    """Integers beyond 64 bits as text, which the verifier reads alike: no message holds them."""
    if isinstance(value, list):
        return [_sendable(item) for item in value]
    if isinstance(value, dict):
        return {key: _sendable(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, int) and value.bit_length() > 63 else value


def _level(value: Any) -> int | None:
    """`Level 3`, `3` or 3 as 3; anything else as None."""
    found = re.search(r"\d+", str(value))
    return int(found.group()) if found else None
