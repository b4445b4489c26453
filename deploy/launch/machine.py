"""What this process may use of the machine that it runs on; `deploy.launch.layout` shares it out."""

from __future__ import annotations

import os

from common.telemetry import visible_gpus


def this_machine() -> tuple[list[int], list[str]]:
    """Numbers of the cores, and indices or UUIDs of the GPUs."""
    return sorted(os.sched_getaffinity(0)), visible_gpus()
