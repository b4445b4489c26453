"""kill -9, twenty times in a row: each process alone and all together, and nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.tracking.spool import read_spool
from tests.scripted.broker import scripted_recipe
from tests.scripted.wait import until

STEPS, PER_STEP = 24, 4
KILLS = 4 * ["broker", "learner", "actor-0", "actor-1", "all"]
PATIENCE_S = 120.0


class Fleet:
    """The processes of a run; each is started again when it has been killed."""

    def __init__(self, folder: Path) -> None:
        recipe = scripted_recipe(
            folder,
            run={"steps": STEPS},
            data={"count": STEPS * PER_STEP // 2, "max_epochs": 2},
            batch={"questions_per_step": PER_STEP},
            broker={"durability": "journal", "max_attempts": 1000},
        )
        self.run_folder = recipe.folder
        self.checkpoint = folder / "checkpoint.json"
        self._recipe = folder / "recipe.json"
        self._recipe.write_text(recipe.model_dump_json())
        self._log = (folder / "log.txt").open("w")
        self.processes: dict[str, subprocess.Popen] = {}
        # A port that stays, as on a cluster: peers find the broker again where it was.
        self.start("broker")
        self._fix_port(recipe)
        for name in ("learner", "actor-0", "actor-1"):
            self.start(name)

    def _fix_port(self, recipe: object) -> None:
        self.address = self._await_address()
        fixed = recipe.broker.model_copy(update={"port": int(self.address.split(":")[1])})
        self._recipe.write_text(recipe.model_copy(update={"broker": fixed}).model_dump_json())

    def _await_address(self) -> str:
        path = self.run_folder / "broker.json"
        until(path.exists, self.tail, PATIENCE_S)
        return json.loads(path.read_text())["address"]

    def start(self, name: str) -> None:
        resume = ["--resume"] if (self.run_folder / "journal").exists() else []
        arguments = {
            "broker": ["tests.scripted.broker", str(self._recipe), *resume],
            "learner": [
                "tests.scripted.learner", getattr(self, "address", ""),
                "--checkpoint", str(self.checkpoint), "--step-s", "0.02",
            ],
        }.get(name, ["tests.scripted.actor", getattr(self, "address", ""), "--name", name, "--group-s", "0.02"])  # fmt: skip
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=self._log, stderr=self._log
        )

    def kill(self, target: str) -> None:
        """Kill and start again; the order of starting is another one each time."""
        names = list(self.processes) if target == "all" else [target]
        for name in names:
            os.kill(self.processes[name].pid, signal.SIGKILL)
        for name in names:
            self.processes[name].wait()
        random.shuffle(names)
        for name in names:
            self.start(name)

    def steps_done(self) -> int:
        try:
            return len(json.loads(self.checkpoint.read_text()))
        except FileNotFoundError:
            return 0

    def tail(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()[-3000:]

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        self._log.close()


def test_twenty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    random.seed(4)
    kills = random.sample(KILLS, len(KILLS))
    fleet = Fleet(tmp_path)
    try:
        for number, target in enumerate(kills):
            until(lambda number=number: fleet.steps_done() >= number, fleet.tail, PATIENCE_S)
            time.sleep(random.random() * 0.1)
            fleet.kill(target)
        until(lambda: fleet.processes["broker"].poll() is not None, fleet.tail, PATIENCE_S)
        assert fleet.processes["broker"].returncode == 0, fleet.tail()
    finally:
        fleet.end()
    history = json.loads(fleet.checkpoint.read_text())
    assert len(history) == STEPS
    assert all(len(step) == PER_STEP for step in history)
    trained = sorted(key for step in history for key in step)
    assert trained == sorted(f"{epoch}:{i}" for epoch in range(2) for i in range(STEPS * PER_STEP // 2))
    end = list(read_spool(fleet.run_folder / "metrics.jsonl"))[-1]
    assert end.kind == "end"
    assert end.values["final"]["step"] == STEPS
    assert end.values["final"]["ledger"]["sum_ok"]
    assert end.values["final"]["ledger"]["consumed"] == STEPS * PER_STEP
