"""`slipstream` for the tests of Slurm and systemd: the verbs that they start, with a real broker and scripted peers.

    python tests/slurm/program.py broker RECIPE --resume --set KEY=VALUE
    python tests/slurm/program.py actor --run FOLDER --name NAME
    python tests/slurm/program.py learner --run FOLDER --resume

SIGTERM means what it means to the real workers: finish what is in hand, save, leave with exit code 0. Each
worker notes that it was here in FOLDER/seen.jsonl. A file FOLDER/hang-NAME makes a worker stop making progress;
an actor has an "engine", a child in a session of its own, as vLLM's is; TEST_EXIT is the code to end with at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from broker.main import serve
from common.errors import EXIT_USER_ERROR, UserError
from common.recipe import load_recipe
from common.systemd import Watchdog, notify_ready
from deploy.folder import prepare
from deploy.workers import _find_broker
from tests.scripted.actor import ScriptedActor
from tests.scripted.learner import ScriptedLearner

GROUP_S = float(os.environ.get("TEST_GROUP_S", "0.05"))
RENDEZVOUS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_SOCKET_IFNAME",
    "SLURM_GPUS_ON_NODE",
    "SLURM_CPUS_PER_TASK",
)


def note(folder: Path, who: str, what: str, **more: int) -> None:
    """One line about a worker; whole lines of several writers do not mix (O_APPEND)."""
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURMD_NODENAME", "SLURM_RESTART_COUNT", *RENDEZVOUS)
    facts = {name: os.environ[name] for name in names if name in os.environ}
    line = json.dumps({"who": who, "what": what, "pid": os.getpid(), "time": time.time(), **more, **facts})
    with (folder / "seen.jsonl").open("a") as file:
        file.write(line + "\n")


def run_broker(recipe: str, overrides: list[str]) -> int:
    """A real broker, as `slipstream broker --resume` starts it, without the tracker."""
    loaded = load_recipe(recipe, overrides)
    folder = prepare(loaded, resume=True, fresh=False)
    note(folder, "broker", "started")
    return serve(loaded, run_folder=folder, resume=True)


def run_actor(folder: Path, name: str) -> int:
    """A scripted actor; SIGTERM drains it."""
    address, keys = _find_broker(None, str(folder), None)
    engine = subprocess.Popen(["sleep", "100000"], start_new_session=True)
    actor = ScriptedActor(address, name, group_s=GROUP_S, keys=keys)
    on_sigterm(actor.stop)
    note(folder, name, "started", engine=engine.pid)
    under_systemd(folder, name)
    actor.run()
    engine.kill()
    note(folder, name, "left")
    return 0


def on_sigterm(stop: Callable[[], None]) -> None:
    """Leave in order, and within ten seconds even when the broker is gone."""

    def leave(*_: object) -> None:
        stop()
        backstop = threading.Timer(10.0, os._exit, (0,))
        backstop.daemon = True
        backstop.start()

    signal.signal(signal.SIGTERM, leave)


def under_systemd(folder: Path, name: str) -> None:
    """Ready, and in progress unless told to hang."""
    notify_ready()
    Watchdog(lambda: not (folder / f"hang-{name}").exists()).run()


def run_learner(folder: Path) -> int:
    """Rank 0 is a scripted learner; all ranks first meet over gloo, with what srun's environment says."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        meet(folder)
    if os.environ.get("RANK", "0") != "0":
        return 0
    address, keys = _find_broker(None, str(folder), None)
    learner = ScriptedLearner(address, folder / "checkpoint.json", step_s=0.1, every=3, keys=keys)
    on_sigterm(learner.stop)
    note(folder, "learner", "started")
    under_systemd(folder, "learner")
    learner.run()
    note(folder, "learner", "left")
    return 0


def meet(folder: Path) -> None:
    """Sum over ranks by gloo."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    note(folder, f"rank {dist.get_rank()}", f"sum {int(total)}")
    dist.destroy_process_group()


def main() -> int:
    """Dispatch a verb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["broker", "actor", "learner"])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    if "TEST_EXIT" in os.environ:
        return int(os.environ["TEST_EXIT"])
    try:
        if options.verb == "broker":
            return run_broker(options.recipe, options.set)
        if options.verb == "actor":
            return run_actor(options.run, options.name)
        return run_learner(options.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
