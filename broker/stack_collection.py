"""The stacks of every process of a run that stands still, wherever they run.

Invariant: the broker's loop waits for nobody: peers dump their own stacks when the reply to a heartbeat asks
them to; those on this host that do not answer are asked by signal, from a thread. A peer's answer is kept only
where it was asked for, once.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from common import stacks

FOLDER = "stacks"


class StackCollection:
    """The stacks of one standstill: `RUN/stacks/TIME-PEER.txt`, one file per peer and one for the broker.

    Peers are asked in the replies to their heartbeats, wherever they run. Those on this host that do not answer
    (frozen, deadlocked, or given up for dead while their process lives on) are asked by signal.

    Args:
        folder: the run folder.
        peers: (name, host, process number) of the peers to ask; those of `lost` have no heartbeats any more.
        lost: names of those that are no longer in the run.
        by_signal_at: when to ask the silent ones by signal, on the broker's monotonic clock.
    """

    def __init__(
        self, folder: Path, peers: Iterable[tuple[str, str, int]], lost: Iterable[str], by_signal_at: float
    ) -> None:
        self._request = time.strftime("%Y%m%d-%H%M%S")
        self.prefix = folder / FOLDER / self._request
        self._peers = {name: (host, pid) for name, host, pid in peers}
        self._lost = set(lost)
        self._missing = set(self._peers)
        self._by_signal_at: float | None = by_signal_at
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs.put(self._keep_own)
        threading.Thread(target=self._work, name="stacks", daemon=True).start()

    @property
    def request(self) -> str | None:
        """What peers are asked in the replies to their heartbeats, while their answers are waited for."""
        return None if self._by_signal_at is None else self._request

    def answered(self, peer: str, request: str, text: str) -> bool:
        """Keep what a peer sent; False when nobody asked it, or it has answered before."""
        if request != self._request or peer not in self._missing:
            return False
        self._missing.discard(peer)
        self._jobs.put(partial(self._keep, peer, text))
        return True

    def tick(self, now: float) -> list[str]:
        """Go on; returns sentences that a person should read."""
        if self._by_signal_at is not None and now >= self._by_signal_at:
            self._by_signal_at = None
            silent = sorted(self._missing)
            self._missing.clear()
            if silent:
                self._jobs.put(partial(self._by_signal, silent))
            self._jobs.put(None)
        said = []
        while not self._said.empty():
            said.append(self._said.get())
        return said

    def _work(self) -> None:
        """All that may wait, for a frozen process or a slow disk, is done here."""
        while (job := self._jobs.get()) is not None:
            job()

    def _keep_own(self) -> None:
        self._keep("broker", stacks.of_family())

    def _by_signal(self, silent: Sequence[str]) -> None:
        unreached = []
        for name in silent:
            host, pid = self._peers[name]
            if host == socket.gethostname() and stacks.can_be_asked(pid):
                self._keep(name, stacks.of_family(pid))
            elif name not in self._lost:
                unreached.append(f"{name} (process {pid} on {host})")
        if unreached:
            self._said.put(
                f"no stacks from {', '.join(unreached)}: no answer, and not a process of this host"
            )

    def _keep(self, name: str, text: str) -> None:
        path = Path(f"{self.prefix}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.txt")
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            self._said.put(f"cannot keep the stacks of {name} in {path}: {error.strerror}")
