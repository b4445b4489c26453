"""Where every thread of a process stands, for a run that stands still.

Invariant: a dump is written by the process itself, in C, from a signal handler (faulthandler): it needs neither
the GIL nor a thread that still runs, so that a deadlocked process can be asked as well as a healthy one. It may read
a frame that another thread is just leaving, and crash: a process never sends the signal to itself, but writes its own
stacks while it holds the GIL and nothing can change. Only a process that has said it is ready for the signal (`arm`)
is ever sent it; for others the kernel's view must do.

A dump goes to an anonymous file in memory, which whoever asks reads through /proc: nothing is on disk before
somebody asks. Forked children are armed with a file of their own; spawned ones call `arm` themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from common.messages import MAX_STACKS_CHARS, Pulse, Stacks

SIGNAL = signal.SIGUSR2  # Slurm's warning before the time limit is USR1
FILE_NAME = "slipstream-stacks"
WRITTEN_S = 0.1  # a dump that has not grown for so long is complete
AWAKE_S = 0.01  # the same for a process that was stopped: it shall hardly get on meanwhile
ANSWER_S = 1.0
POLL_S = 0.002

_file: int | None = None
_owner: int | None = None  # process that opened `_file`; a fork inherits both


def arm() -> None:
    """Make this process, and those that it forks, answer `SIGNAL` with their stacks; may be called again."""
    if _owner is None:
        os.register_at_fork(after_in_child=_open_file)
    if _owner != os.getpid():
        _open_file()


def _open_file() -> None:
    global _file, _owner
    inherited = _file
    try:
        _file = os.memfd_create(FILE_NAME)
    except OSError:  # out of descriptors: it shares its parent's file
        return
    faulthandler.register(SIGNAL, file=_file, all_threads=True, chain=False)
    _owner = os.getpid()
    if inherited is not None:
        os.close(inherited)


def of_process(pid: int, answer_s: float = ANSWER_S) -> str:
    """What process `pid` of this host is doing: its Python stacks if it can be asked, and the kernel's view.

    A process that was stopped (SIGSTOP) is woken for as long as writing takes, milliseconds, and stopped again.
    """
    try:
        process = psutil.Process(pid)
        heading = _heading(process)
        stopped = process.status() == psutil.STATUS_STOPPED
    except psutil.Error as error:
        return f"process {pid}: {type(error).__name__}\n"
    file = _dump_file(pid)
    if file is None:
        return heading + "(not a process of Slipstream, or still starting: it has no Python stacks to show)\n"
    try:
        dump = _ask(pid, file, answer_s, wake=stopped)
    except OSError as error:
        dump = f"(cannot be asked: {error})\n"
    return heading + (dump or f"(no answer to {SIGNAL.name} within {answer_s:.0f} s)\n")


def of_family(pid: int | None = None, answer_s: float = ANSWER_S) -> str:
    """The stacks of a process (default: this one) and of all that descend from it."""
    return "\n".join(of_process(member, answer_s) for member in _family(os.getpid() if pid is None else pid))


def can_be_asked(pid: int) -> bool:
    """Whether a process of this host and user, or one that descends from it, answers `SIGNAL`."""
    return any(_dump_file(member) is not None for member in _family(pid))


def _family(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def of_tasks() -> str:
    """The stacks of the running event loop's tasks, which hide behind one line of a thread's stack."""
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue()


def _dump_file(pid: int) -> Path | None:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if f"memfd:{FILE_NAME} " in os.readlink(entry):
                    return entry
    return None


def _ask(pid: int, file: Path, answer_s: float, *, wake: bool) -> str:
    with file.open("rb") as dump:
        before = dump.seek(0, io.SEEK_END)
        if pid == os.getpid() and _file is not None:
            faulthandler.dump_traceback(file=_file, all_threads=True)
        else:
            _send(pid, dump, before, answer_s, wake=wake)
        dump.seek(before)
        return dump.read().decode("utf-8", "replace")


def _send(pid: int, dump: io.BufferedReader, before: int, answer_s: float, *, wake: bool) -> None:
    os.kill(pid, SIGNAL)
    if wake:
        os.kill(pid, signal.SIGCONT)
    try:
        _wait_until_written(dump, before, answer_s, AWAKE_S if wake else WRITTEN_S)
    finally:
        if wake:
            os.kill(pid, signal.SIGSTOP)


def _wait_until_written(dump: io.BufferedReader, before: int, answer_s: float, quiet_s: float) -> None:
    deadline = time.monotonic() + answer_s
    size, since = before, time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if (now := dump.seek(0, io.SEEK_END)) != size:
            size, since = now, time.monotonic()
        elif size > before and time.monotonic() - since > quiet_s:
            return


def _heading(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())[:200] or process.name()
        return (
            f"=== process {process.pid} ({process.status()}), started "
            f"{time.strftime('%H:%M:%S', time.localtime(process.create_time()))}: {command}\n"
            f"threads in the kernel: {', '.join(_kernel_view(process.pid)) or 'unknown'}\n"
        )
    return f"=== process {process.pid}\n"


def _kernel_view(pid: int) -> Iterator[str]:
    """One "name state wait-channel" per thread."""
    with contextlib.suppress(OSError):
        for thread in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
            with contextlib.suppress(OSError, IndexError):
                name = (thread / "comm").read_text().strip()
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                yield f"{name} {state} {(thread / 'wchan').read_text().strip() or '-'}"


class StackAnswers:
    """Answers a broker that asks for stacks (`Pulse.dump_stacks`), once per request."""

    def __init__(self) -> None:
        self._answered: str | None = None

    def wanted(self, pulse: Pulse) -> str | None:
        """The request to answer now, or None; it counts as answered from here on."""
        if pulse.dump_stacks is None or pulse.dump_stacks == self._answered:
            return None
        self._answered = pulse.dump_stacks
        return pulse.dump_stacks

    @staticmethod
    def answer(request: str, extra: str = "") -> Stacks:
        """The stacks of this process and its children, after `extra`; takes a second or so per frozen child."""
        return Stacks(request=request, text=(extra + of_family())[:MAX_STACKS_CHARS])
