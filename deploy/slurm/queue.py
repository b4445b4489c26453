"""Slurm's own commands, and what they answer.

Invariant: whatever Slurm refuses becomes one sentence in Slurm's own words that names the command; no wait is
without a deadline.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from common.errors import UserError
from deploy.slurm.plan import seconds_of

DEADLINE_S = 60.0
HOLDING = ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "SIGNALING", "STAGE_OUT")


class Task(NamedTuple):
    """One entry of the queue; `index` is None for a job that is no array."""

    job: int
    index: int | None  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    state: str

    @property
    def label(self) -> str:
        """What scancel and scontrol call it."""
        return str(self.job) if self.index is None else f"{self.job}_{self.index}"


def require_slurm() -> None:
    """Raise `UserError` when this machine cannot submit."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "sinfo") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found: run this on a login node of the cluster, or give --dry-run to only "
            "write the files."
        )


def call(*arguments: str, text: str | None = None) -> str:
    """Run one of Slurm's commands; returns its standard output.

    Raises:
        UserError: it failed, or gave no answer within 60 s.
    """
    try:
        done = subprocess.run(
            arguments, input=text, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{arguments[0]} not found: run this on a login node of the cluster.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{arguments[0]} gave no answer for {DEADLINE_S:.0f} s: is slurmctld up?") from None
    if done.returncode:
        raise UserError(f"{arguments[0]} refused: {_last_error(done.stderr or done.stdout)}")
    return done.stdout


def _last_error(text: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no reason given").rstrip(".") + "."


def require_partition(name: str, *, option: str) -> None:
    """Raise `UserError`, listing the partitions that exist, when there is none of this name."""
    known = sorted(
        {line.strip().rstrip("*") for line in call("sinfo", "--noheader", "--format=%R").splitlines()}
    )
    for part in name.split(","):
        if part not in known:
            raise UserError(f"there is no partition '{part}'; there are: {', '.join(known)}.", setting=option)


def default_limit(partition: str | None) -> str | None:
    """Time limit of a job that names none; None: no limit. The shortest, of several partitions."""
    named = (f"--partition={partition}",) if partition else ()
    lines = [line.split("|") for line in call("sinfo", "--noheader", "--format=%P|%L|%l", *named).split()]
    limits = [
        limit if limit[0].isdigit() else longest
        for name, limit, longest in lines
        if partition or name.endswith("*")
    ]
    return min((limit for limit in limits if limit[0].isdigit()), key=seconds_of, default=None)


def try_script(script: str) -> None:
    """Ask Slurm whether it would take a batch file, without submitting it."""
    call("sbatch", "--test-only", text=script)


def submit_file(path: str, *options: str) -> int:
    """Submit a batch file; returns the job's number."""
    answer = call("sbatch", "--parsable", *options, path)
    return int(answer.strip().split(";")[0])


def queued(name: str) -> list[Task]:
    """Tasks of this user's jobs called `name` that run, wait or are about to; array tasks one by one."""
    answer = call("squeue", "--me", "--array", "--noheader", f"--name={name}", "--format=%F|%K|%T")
    tasks = []
    for line in answer.splitlines():
        job, index, state = line.strip().split("|")
        if state in HOLDING:
            tasks.append(Task(int(job), int(index) if index.isdigit() else None, state))
    return tasks


def cancel(labels: Iterable[str]) -> None:
    """Take jobs out of the queue, or end them at once; those that are gone already do not matter."""
    labels = list(labels)
    if labels:
        call("scancel", "--quiet", *labels)


def ask_to_leave(labels: Iterable[str]) -> None:
    """SIGTERM to the batch scripts alone: workers finish what they have and leave by themselves."""
    labels = list(labels)
    if labels:
        call("scancel", "--quiet", "--batch", "--signal=TERM", *labels)


def array_ranges(indices: Iterable[int]) -> str:
    """Indices as sbatch --array takes them: 0,2-5."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
