"""The accuracy targets of the verifier, on the shared grader cases where they are present.

What must hold at level `full`: core cases >= 98 % without a false positive; all tags but `convention` and `needs_args`
>= 93 %; hostile >= 98 %; mutants passed <= 0.3 %; variants missed <= 0.5 %; every gold answer equals itself. Level
`fast` has no false positive that `full` has not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common.verifier import grade

_HERE = Path(__file__).resolve()
SHARED = Path(os.environ.get("SLIPSTREAM_SHARED", _HERE.parents[4] / "shared"))
pytestmark = pytest.mark.skipif(
    not (SHARED / "grader").is_dir(), reason="the shared grader cases are not here (SLIPSTREAM_SHARED)"
)
POLICY_TAGS = {"convention", "needs_args"}


@cache
def _rows(name: str) -> list[dict[str, Any]]:
    with open(SHARED / "grader" / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _judged(
    rows: list[dict[str, Any]], level: str = "full", template: str = "auto"
) -> Iterator[tuple[bool, bool]]:
    """(expected, got) of the rows with an expectation."""
    for row in rows:
        verdict = grade(row["response"], row["gold"], level=level, template=template)  # type: ignore[arg-type]
        if row["expect"] in (True, False):
            yield row["expect"], verdict.reward == 1.0


def _share(rows: list[dict[str, Any]], **options: str) -> float:
    results = list(_judged(rows, **options))
    return sum(expected == got for expected, got in results) / len(results)


def _core() -> list[dict[str, Any]]:
    return [r for r in _rows("cases.jsonl") if not r["tags"]]


@pytest.mark.parametrize("template", ["auto", "boxed"])
def test_core_cases_are_right_and_none_falsely(template: str) -> None:
    results = list(_judged(_core(), template=template))
    assert sum(e == g for e, g in results) >= 0.98 * len(results)
    assert not any(g and not e for e, g in results)


def test_tagged_cases_except_policies() -> None:
    assert _share([r for r in _rows("cases.jsonl") if not POLICY_TAGS & set(r["tags"])]) >= 0.93


def test_hostile_cases() -> None:
    assert _share(_rows("hostile.jsonl")) >= 0.98


def test_wrong_mutations_fail() -> None:
    passed = sum(got for _, got in _judged(_rows("mutants.jsonl")))
    assert passed <= 0.003 * len(_rows("mutants.jsonl"))


def test_harmless_variants_pass() -> None:
    missed = sum(not got for _, got in _judged(_rows("variants.jsonl")))
    assert missed <= 0.005 * len(_rows("variants.jsonl"))


def test_fast_has_no_false_positive_that_full_has_not() -> None:
    for name in ("cases.jsonl", "hostile.jsonl", "mutants.jsonl"):
        rows = [r for r in _rows(name) if r["expect"] is False]
        for row, (_, fast) in zip(rows, _judged(rows, level="fast"), strict=True):
            if fast:
                assert grade(row["response"], row["gold"], level="full", template="auto").reward == 1.0


def _golds() -> Iterator[Any]:
    for path in sorted((SHARED / "data").glob("*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                answer = json.loads(line)["answer"]
                yield from answer if isinstance(answer, list) else [answer]


@pytest.mark.parametrize("level", ["fast", "full"])
def test_every_gold_equals_itself(level: str) -> None:
    missed = [g for g in _golds() if grade(f"so $\\boxed{{{g}}}$.", g, level=level).reward != 1.0]  # type: ignore[arg-type]
    assert missed == []


def test_every_parsed_gold_equals_itself_without_the_string_shortcut() -> None:
    """Reflexivity of the comparison of trees, which string equality would hide."""
    from common.verifier.compare import equal
    from common.verifier.grade import gold_readings

    golds = sorted({str(g) for g in _golds()})
    readings = [r for g in golds for r in gold_readings(g) if r.trees and not r.words]
    missed = [r.text for r in readings if not any(equal(t, t) for _, t in r.trees)]
    assert missed == []
    assert len(readings) > 0.97 * len([g for g in golds if any(c.isdigit() for c in g)])
