"""Start, watch, restart and end the processes of a run on one machine.

Invariant: no process outlives the supervisor, whatever way it ends; the first error that a restart does not
cure is what the user reads first, and it ends the run unless the run can go on without that worker. Every worker
is started by a command line that a person could type, with its output in `<run folder>/<worker>.log`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import stacks
from common.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR
from common.process import die_with_parent, end_groups, use_cores, wait_for
from common.program import own_program
from deploy.launch.layout import Share

BACKOFF_S = 1.0
HEALTHY_S = 120.0  # a worker that has lived so long has its restarts back
MISSED_S = 60.0  # within which the run ends too, after the orderly end of a worker that it needs
FATAL = (EXIT_USER_ERROR, EXIT_RUN_FAILED)
# torch's C++ side prints a stack for every peer that leaves a rendezvous, which is an everyday event here.
QUIET = {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass
class Worker:
    """One supervised process.

    Attributes:
        name: of the process and its log.
        command: argument vector of the first start; `again` that of later ones.
        share: cores, threads and GPUs.
        essential: its orderly end (exit 0) ends the run.
        needed: where the run has not ended `MISSED_S` after its orderly end, it is started again.
        spare: the run goes on without it while another spare worker is left.
    """

    name: str
    command: list[str]
    again: list[str]
    share: Share
    log: Path
    essential: bool = False
    needed: bool = False
    spare: bool = False
    process: subprocess.Popen | None = None
    restarts: int = 0
    started: float = 0.0
    not_before: float = 0.0
    ended: bool = False
    in_order: bool = False


@dataclass
class Failure:
    """Why a run ended: the worker, its exit code, the line to show first, and where to read on."""

    worker: str
    code: int
    message: str
    log: Path


@dataclass
class Supervisor:
    """Keeps workers alive.

    Args:
        workers: what to run, in the order of starting.
        restarts: restarts of one worker before the run is given up.
        on_event: called with a sentence whenever a worker dies or starts again.
    """

    workers: list[Worker]
    restarts: int
    on_event: Callable[[str], None]
    failure: Failure | None = None
    stopping: bool = field(default=False)
    retired: list[Failure] = field(default_factory=list)

    def start(self) -> None:
        """Start every worker."""
        for worker in self.workers:
            self._spawn(worker, worker.command)

    def poll(self) -> bool:
        """Look after the workers once; False when the run is over, well or not (`failure`)."""
        for worker in self.workers:
            if worker.process is None or worker.ended:
                self._restart_when_due(worker)
            elif (code := worker.process.poll()) is not None:
                self._exited(worker, code)
        return self.failure is None and not self._over()

    def _over(self) -> bool:
        return any(worker.essential and worker.ended for worker in self.workers)

    def _exited(self, worker: Worker, code: int) -> None:
        assert worker.process is not None
        end_groups([worker.process], term_s=0.0)  # what it may have left behind
        if code == 0 and worker.needed and not self.stopping:
            worker.process, worker.in_order = None, True
            worker.not_before = time.monotonic() + MISSED_S
            return
        if code == 0 or self.stopping:
            worker.ended = True
            return
        message = first_error(worker.log) or f"exit code {code}"
        if time.monotonic() - worker.started > HEALTHY_S:
            worker.restarts = 0
        if code in FATAL or worker.restarts >= self.restarts:
            worker.ended = True
            self._failed(worker, Failure(worker.name, code, message, worker.log))
            return
        worker.restarts += 1
        worker.process = None
        worker.not_before = time.monotonic() + BACKOFF_S * worker.restarts
        self.on_event(f"{worker.name} died ({_cause(code)}: {message}); starting it again")

    def _failed(self, worker: Worker, failure: Failure) -> None:
        """A restart does not help: the run ends, unless the worker was a spare one and another is left."""
        if not worker.spare:
            self.failure = self.failure or failure
            return
        self.retired.append(failure)
        left = sum(other.spare and not other.ended for other in self.workers)
        if not left:
            self.failure = self.failure or self.retired[0]
            return
        cause = f"{_cause(failure.code)}: {failure.message}"
        self.on_event(
            f"warning: {worker.name} has failed for good ({cause}); the run goes on with {left} left"
        )

    def _restart_when_due(self, worker: Worker) -> None:
        if worker.ended or self.stopping or time.monotonic() < worker.not_before:
            return
        if worker.in_order:
            worker.in_order = False
            self.on_event(f"{worker.name} has left in order, but the run goes on; starting it again")
        self._spawn(worker, worker.again)

    def _spawn(self, worker: Worker, command: list[str]) -> None:
        cores = worker.share.roaming or worker.share.cores

        def prepare() -> None:
            die_with_parent()
            use_cores(cores)

        with worker.log.open("ab") as log:
            worker.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET, **worker.share.environment()},
                start_new_session=True,
                preexec_fn=prepare,
            )
        worker.started = time.monotonic()

    def keep_stacks(self, folder: Path) -> Path:
        """Write the stacks of every living worker and its children to `folder`; returns their common prefix."""
        folder.mkdir(exist_ok=True)
        prefix = folder / time.strftime("%Y%m%d-%H%M%S")
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is None:
                path = Path(f"{prefix}-{worker.name}.txt")
                path.write_text(stacks.of_family(worker.process.pid), encoding="utf-8")
        return prefix

    def left(self, name: str) -> bool:
        """Whether the worker of this name does not run (any more)."""
        return all(w.process is None or w.process.poll() is not None for w in self.workers if w.name == name)

    def ask_to_leave(self, name: str) -> None:
        """SIGTERM to the worker of this name."""
        for worker in self.workers:
            if worker.name == name and worker.process is not None and worker.process.poll() is None:
                worker.process.terminate()

    def wait(self, seconds: float) -> bool:
        """Wait until all workers have left by themselves; False when some have not in time."""
        self.stopping = True
        return not wait_for([w.process for w in self.workers if w.process is not None], seconds)

    def end(self, *, term_s: float) -> None:
        """End what still runs: SIGTERM, then SIGKILL to whole process groups."""
        self.stopping = True
        end_groups([w.process for w in self.workers if w.process is not None], term_s=term_s)


def first_error(log: Path) -> str | None:
    """The sentence to show of a dead worker: its last `error:` line, else the last line of its traceback."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = [
                line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()
            ]
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return lines[-1][:400] if lines else None


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def command(*arguments: str) -> list[str]:
    """The command line of a verb of this installation."""
    return [*own_program(), *arguments]
