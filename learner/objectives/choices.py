"""Named choices of a recipe, refused by name when unknown."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from common.errors import UserError


def check_choice(setting: str, value: str, valid: Collection[str]) -> None:
    """Raise UserError, listing `valid`, unless `value` is one of them."""
    if value not in valid:
        raise UserError(f"unknown value {value!r}; choose one of {', '.join(valid)}", setting=setting)


def check_range(setting: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise UserError unless `value` is a finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        raise UserError(f"must be a number from {low:g} to {high:g}, not {value}", setting=setting)


def check_positive(setting: str, value: float) -> None:
    """Raise UserError unless `value` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"must be a number above 0, not {value}", setting=setting)


def name_rows(rows: Iterable[int], names: Collection[str] | None) -> str:
    """'group a, group b, ...' (at most three) for an error message."""
    labels = list(names) if names is not None else None
    listed = [f"group {labels[row] if labels else row}" for row in rows]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
