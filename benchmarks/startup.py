"""Start-up of a run against the bare minimum: importing vLLM and starting the same engine.

    python -m benchmarks.startup [RECIPE] [--repeats 3] [--set key=value ...]

The reference is a Python process that does nothing but import vLLM and build the recipe's engine. In the run
everything starts at the same time on the same cores; the broker is ready when it answers, the learner when the
weights of version 0 can be fetched from it, the actor when its engine has generated a token and it has said
Hello. Seconds from the command, medians over the repeats, sides taking turns: one line of JSON per run, then
whether broker and learner were ready no later than the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bare_engine import bare_arguments
from benchmarks.whole_run import BARE, running
from common.messages import Hello, StatusQuery, Welcome
from common.run_files import ADDRESS_FILE
from common.wire import BrokerUnreachable, Client

LIMIT_S = 300.0
POLL_S = 0.05


def main() -> None:
    """Measure both sides in turn."""
    options = _options()
    if options.bare:
        _start_engine(options.recipe, options.set)
        return
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        found = {"bare": _bare_seconds(), **_run_seconds(options.recipe, options.set)}
        print(json.dumps({name: round(value, 2) for name, value in found.items()}), flush=True)
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    others = max(medians["broker"], medians["learner"])
    verdict = {
        "medians_s": {name: round(value, 2) for name, value in medians.items()},
        "others_to_actor": round(others / medians["actor"], 2),
        "first_lease_to_bare": round(medians["first_lease"] / medians["bare"], 2),
    }
    print(json.dumps(verdict))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--bare", action="store_true", help="internal: the reference")
    return parser.parse_args()


# --- the reference ----------------------------------------------------------------------------------------


def _bare_seconds() -> float:
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    arguments = [sys.executable, "-m", "benchmarks.startup", *sys.argv[1:], "--bare"]
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        ready = any(line.strip() == b"ready" for line in process.stdout)
        seconds = time.monotonic() - started
        process.kill()
    if not ready:
        raise SystemExit("the bare engine did not start")
    return seconds


def _start_engine(recipe: str, overrides: list[str]) -> None:
    from vllm import LLM

    from common.recipe import load_recipe

    LLM(**bare_arguments(load_recipe(recipe, overrides)))
    print("ready", flush=True)
    time.sleep(LIMIT_S)


# --- the run ----------------------------------------------------------------------------------------------


def _run_seconds(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Seconds from the command until each process was ready and until the first question was asked."""
    with tempfile.TemporaryDirectory() as root:
        started = time.time()
        with running(recipe, [*BARE, *overrides], Path(root)):
            address = _address(Path(root), started)
            found = {"broker": time.time() - started}
            while len(found) < 4:
                _look(address, found, started)
                _wait(started)
    return found


def _look(address: str, found: dict[str, float], started: float) -> None:
    client = Client(
        address, Hello(role="observer", peer="startup", software="0", host="here", pid=os.getpid())
    )
    try:
        welcome = client.connect(LIMIT_S)
        status = client.request(StatusQuery()).message.status  # type: ignore[attr-defined]
    except BrokerUnreachable:
        return
    finally:
        client.close()
    assert isinstance(welcome, Welcome)
    now = time.time() - started
    if welcome.weights is not None:
        found.setdefault("learner", now)
    if any(peer["role"] == "actor" for peer in status["peers"].values()):
        found.setdefault("actor", now)
    if status["first_lease_time"] is not None:
        found.setdefault("first_lease", status["first_lease_time"] - started)


def _address(root: Path, started: float) -> str:
    while not (files := list(root.glob(f"*/{ADDRESS_FILE}"))):
        _wait(started)
    return json.loads(files[0].read_text())["address"]


def _wait(started: float) -> None:
    if time.time() - started > LIMIT_S:
        raise SystemExit(f"the run was not ready within {LIMIT_S:.0f} s")
    time.sleep(POLL_S)


if __name__ == "__main__":
    main()
