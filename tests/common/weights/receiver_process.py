"""Scripted receivers in processes of their own, which tests may freeze and kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from common.weights.scripted import ScriptedReceiver

# Workers fork from a server that has torch loaded but neither threads nor groups: a receiver costs 30 ms.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "common.weights.scripted"])


def _serve(log: Path, options: dict) -> None:
    def committed(version: int, checksums: dict[str, str]) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"version": version, "checksums": checksums}) + "\n")

    ScriptedReceiver(on_commit=committed, **options).run()


class ReceiverProcess:
    """One scripted receiver. `options` are those of `ScriptedReceiver`."""

    def __init__(self, folder: Path, **options) -> None:
        self.log = folder / f"{options['actor_id']}.{time.monotonic_ns()}.jsonl"
        self.log.touch()
        self._process = _CONTEXT.Process(target=_serve, args=(self.log, options), daemon=True)
        self._process.start()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def commits(self) -> list[dict]:
        """What was committed so far: version and checksums."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def version(self) -> int | None:
        done = self.commits()
        return done[-1]["version"] if done else None

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        if self._process.is_alive():
            self.signal(signal.SIGCONT)
            self._process.kill()
        self._process.join(5)
