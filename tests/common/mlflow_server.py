"""A real `mlflow server` on loopback that can be killed, frozen and started again on the same store."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.scripted.ports import reserved_port
from tests.scripted.wait import until

START_S = 240.0


class MlflowServer:
    """`start` and `kill` as often as needed; the database is `folder`/mlflow.db."""

    def __init__(self, folder: Path) -> None:
        self.database, self._folder = folder / "mlflow.db", folder
        self._reserved = ExitStack()  # or another takes the port while the server is away
        self.port = self._reserved.enter_context(reserved_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # half the start-up time
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        log = (self._folder / "server.log").read_text

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, log()
            return self._answers()

        until(answers, log, START_S, every=0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL; harmless when it is not running."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Kill it and give its port free."""
        self.kill()
        self._reserved.close()

    def sql(self, statement: str) -> list[tuple]:
        """Run a statement in the database, behind the server's back."""
        with sqlite3.connect(self.database, timeout=30) as database:
            return database.execute(statement).fetchall()

    def metrics(self, run: str) -> Counter[tuple[str, int, float]]:
        """How often each (metric, step, value) is in the store."""
        rows = self.sql(f"SELECT key, step, value FROM metrics WHERE run_uuid = '{run}' AND NOT is_nan")
        return Counter((key, step, value) for key, step, value in rows)
