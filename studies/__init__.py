"""The paper's experiments (arXiv 2503.20783), each one command, in miniature and in full size.

A study states its expectations with numbers before it runs and reports confirmed, not confirmed or unclear from
the rows of its own run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from studies.study import Study

# name -> module and class; loaded when asked for, since torch takes seconds to import.
STUDIES: dict[str, str] = {
    "length-bias": "studies.length_bias:LengthBias",
    "templates": "studies.templates:Templates",
    "exploration": "studies.exploration:Exploration",
    "reflection": "studies.reflection:SelfReflection",
    "dr-grpo": "studies.dr_grpo:DrGrpo",
    "duet": "studies.duet:Duet",
    "pretraining": "studies.pretraining:Pretraining",
    "leaderboard": "studies.leaderboard:Leaderboard",
    "staleness": "studies.staleness:Staleness",
    "countdown": "studies.countdown:Countdown",
}


def find_study(name: str) -> Study:
    """The study of a name.

    Raises:
        UserError: there is none (the message lists all).
    """
    if name not in STUDIES:
        raise UserError(f"unknown study '{name}'; valid ones: {', '.join(STUDIES)}", setting="NAME")
    module, _, cls = STUDIES[name].partition(":")
    return getattr(importlib.import_module(module), cls)()
