"""The verifier's speed and accuracy against Math-Verify, on the same cases in the same run, single-threaded.

    python -m benchmarks.verifier [--cases 600] [--level full]

Math-Verify is called as its users are told to: both sides in boxes, its own timeouts on. Cases are the shared grader
cases where they are present (SLIPSTREAM_SHARED), else generated ones. Nothing is cached between cases: each is read once
and our caches are emptied first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from common.verifier import grade
from common.verifier.grade import gold_readings, read

TARGET_RATIO = 10.0
TARGET_P99_MS = 50.0


class Case(NamedTuple):
    """One response, its gold answer, and whether it is right."""

    response: str
    gold: str
    expect: bool


class Timing(NamedTuple):
    """Seconds per case, in order, and how many verdicts were as expected."""

    seconds: list[float]
    right: int


def shared_cases() -> list[Case]:
    """Core cases, mutants and variants; empty where the shared folder is not present."""
    root = (
        Path(os.environ.get("SLIPSTREAM_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "grader"
    )
    found: list[Case] = []
    for name in ("cases", "mutants", "variants"):
        path = root / f"{name}.jsonl"
        rows = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )
        found += [Case(r["response"], r["gold"], r["expect"]) for r in rows if not r.get("tags")]
    return found


def generated_cases(n: int) -> list[Case]:
    """Integers, fractions, roots and expressions, half of them right."""
    rng = random.Random(0)
    found: list[Case] = []
    for _ in range(n // 4 + 1):
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
        right = rng.random() < 0.5
        d = a if right else a + 1
        for answer, gold in (
            (f"{d}", f"{a}"),
            (rf"\frac{{{2 * d}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}"),
            (rf"{c}\sqrt{{{d}}}", rf"\sqrt{{{c * c * a}}}"),
            (f"x^2+{2 * d}x+{d * d}", f"(x+{a})^2"),
        ):
            found.append(Case(rf"Therefore the final answer is $\boxed{{{answer}}}$.", gold, right))
    return found[:n]


def math_verify() -> Callable[[Case], bool]:
    """Math-Verify as a function of a case."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def run(case: Case) -> bool:
        gold = case.gold if "\\boxed" in case.gold else rf"\boxed{{{case.gold}}}"
        return bool(verify(parse(gold), parse(case.response)))

    return run


def ours(level: Any) -> Callable[[Case], bool]:
    """This verifier as a function of a case."""
    return lambda case: grade(case.response, case.gold, level=level, template="auto").reward == 1.0


def timed(run: Callable[[Case], bool], cases: list[Case]) -> Timing:
    """Runs every case once, after one unrelated case that loads the libraries."""
    run(Case(r"\boxed{\sqrt{2}+\frac{x}{3}}", r"\frac{x}{3}+\sqrt2", True))
    read.cache_clear()
    gold_readings.cache_clear()
    seconds, right = [], 0
    for case in cases:
        started = time.perf_counter()
        verdict = run(case)
        seconds.append(time.perf_counter() - started)
        right += verdict == case.expect
    return Timing(seconds, right)


def _row(name: str, timing: Timing) -> list[str]:
    ordered = sorted(timing.seconds)
    n = len(ordered)
    quantile = [1e3 * ordered[min(n - 1, int(q * n))] for q in (0.5, 0.99, 1.0)]
    mean = 1e3 * statistics.fmean(ordered)
    return [
        name,
        f"{timing.right / n:.2%}",
        f"{n / sum(ordered):,.0f}",
        f"{mean:.3f}",
        *(f"{q:.2f}" for q in quantile),
    ]


def main() -> None:
    """Prints the table, the ratio, and whether the targets are met."""
    options = argparse.ArgumentParser(description="The verifier against Math-Verify.")
    options.add_argument("--cases", type=int, default=600, help="cases at most")
    options.add_argument("--level", choices=["fast", "full"], default="full")
    arguments = options.parse_args()
    cases = shared_cases() or generated_cases(arguments.cases)
    cases = random.Random(0).sample(cases, min(arguments.cases, len(cases)))
    mine, theirs = timed(ours(arguments.level), cases), timed(math_verify(), cases)
    table = Table(
        "grader",
        "accuracy",
        "cases / s",
        "mean ms",
        "p50 ms",
        "p99 ms",
        "max ms",
        title=f"{len(cases)} cases",
    )
    table.add_row(*_row(f"this verifier ({arguments.level})", mine))
    table.add_row(*_row("Math-Verify", theirs))
    ratio = sum(theirs.seconds) / sum(mine.seconds)
    p99 = 1e3 * sorted(mine.seconds)[int(0.99 * len(cases))]
    met = ratio >= TARGET_RATIO and p99 < TARGET_P99_MS and mine.right >= theirs.right
    console = Console()
    console.print(table)
    console.print(
        f"ratio of cases per second: {ratio:.1f} (target {TARGET_RATIO:.0f}); p99 {p99:.2f} ms (target {TARGET_P99_MS:.0f}): "
        + ("met" if met else "NOT met")
    )


if __name__ == "__main__":
    main()
