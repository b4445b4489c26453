"""Several ranks of the learner on this machine, under torchrun.

Invariant: this process stays the parent of torchrun. What a rank ended on is its exit code (torchrun alone would say
1 for everything); a signal to it reaches the ranks, which then have all the time that whoever sent it gives them
(torchrun alone would kill them after 30 s, in the middle of a large checkpoint); and no rank outlives it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from common.process import STOPS, StopSignal, die_with_parent
from learner.outcome import forget_outcome, read_outcome

POLL_S = 0.5


def run_ranks(ranks: int, program: Sequence[str], folder: Path) -> int:
    """Start the ranks, pass signals on, wait for their end.

    Args:
        ranks: how many.
        program: argument vector that each of them runs.
        folder: the run's.

    Returns:
        0 when all ranks ended in order, 2 or 4 when one of them says that a restart would fail again, else
        torchrun's own code.
    """
    forget_outcome(folder)
    stop, told = StopSignal(), set[int]()
    torchrun = subprocess.Popen(
        [
            # -P: a `torch.py` of the working directory is not torch.
            *(
                sys.executable,
                "-P",
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
            ),
            *("--signals-to-handle=SIGHUP,SIGQUIT", "--no-python"),
            *program,
        ],
        preexec_fn=_prepare,
    )
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = torchrun.wait(POLL_S)
            break
        if stop.is_set():
            _tell_ranks(torchrun.pid, told)
    if code == 0:
        return 0
    return read_outcome(folder) or max(code, 1)


def _prepare() -> None:
    """In torchrun, before it starts: the ranks hear signals from us, or from the terminal, and it waits for them."""
    die_with_parent()
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _tell_ranks(torchrun: int, told: set[int]) -> None:
    """SIGTERM to each rank, once and as soon as it listens; `told` has those that were sent it.

    One that is still importing would miss it, and one that is on its way out, where Python listens no more, would die of
    a second.
    """
    with suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(torchrun).children():
            if rank.pid not in told and _listens(rank.pid):
                told.add(rank.pid)
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM)


def _listens(pid: int) -> bool:
    """Whether a process handles SIGTERM; False where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    handled = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(handled >> (signal.SIGTERM - 1) & 1)
