"""Reward functions for the pool's tests, good and broken."""

from __future__ import annotations

import os
import time
from typing import Any


def length(response: str, question: dict[str, Any]) -> float:
    return min(1.0, len(response) / question["length"])


def named(response: str, question: dict[str, Any]) -> tuple[float, str]:
    return (0.1, "unformatted") if response == "?" else (1.0, "correct")


def by_name(response: str, question: dict[str, Any]) -> Any:
    """Misbehaves as the response says."""
    if response == "raise":
        raise ValueError("no such luck")
    if response == "hang":
        while True:
            pass
    if response == "exit":
        os._exit(3)
    if response == "sleep":
        time.sleep(60)
    return {"nan": float("nan"), "text": "good", "none": None, "odd": (1.0, "great")}.get(response, 1.0)
