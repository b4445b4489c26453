"""What the broker costs: bytes per second, CPU per group, memory, restart; each beside a reference of the same run.

    python -m benchmarks.broker [throughput actors memory restart] [--steps 60] [--json FILE]

throughput  payload bytes/s from actor to learner through the broker, journal on and off, against a bare pyzmq
            ROUTER -> DEALER relay of the same frames (paper's payload: 8 responses of 1,000 tokens)
actors      the broker's CPU seconds per group with 1, 10, 100 and 1,000 scripted actors, against one
memory      the broker's resident memory with the buffer full, against the payload that it holds
restart     seconds from the start of the process to the first answer with 10,000 groups in the buffer, against
            a start without any

Server and load have the machine together and nothing is pinned, for the broker as for its reference. Invariant:
every figure is a median of several repetitions, alternating with its reference, and is printed with their ratio.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import zmq

from benchmarks.broker_load import Clock, Learner, Rate, actor_fleet, publish_frames, relay, relay_load
from broker.group import Facts
from broker.journal import Journal
from broker.ledger import Ledger
from broker.main import identity, serve
from broker.state import load_training_set, rules_of
from broker.store import Entry
from common.messages import Assignment, GroupId
from common.recipe.schema import Recipe
from common.run_files import ADDRESS_FILE, JOURNAL_FOLDER

REPEATS = 3
GROUP, TOKENS, PER_STEP = 8, 1000, 64
BUFFERED = 10_000
FLEETS = (1, 10, 100, 1000)
MIB = 1 << 20
# Tokens per second that one A100 samples with a 7B model: the paper's whole recipe (27 h on 8 A100 for about
# 290 steps of 1,024 responses of about 1,000 tokens), and an assumption for one that does nothing but sample.
A100_TOKENS_PER_S = {"paper's recipe, training included": 382.0, "sampling only (assumed)": 3000.0}
_SPAWNED = multiprocessing.get_context("spawn")


def make_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe with the paper's payload and a question set big enough for every part."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps({"vocab_size": 152064}))
    rows = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(BUFFERED)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "root": folder, "steps": 4000},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "questions.jsonl"), "max_epochs": 1000},
        "rollout": {"group_size": GROUP},
        "batch": {"questions_per_step": PER_STEP, "optimizer_steps": 1, "max_staleness": 3},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Recipe.model_validate(tree)


def _serve(recipe_json: str) -> None:
    recipe = Recipe.model_validate_json(recipe_json)
    resume = (recipe.folder / JOURNAL_FOLDER).exists()
    serve(recipe, run_folder=recipe.folder, resume=resume)


@contextmanager
def broker(recipe: Recipe) -> Iterator[tuple[str, psutil.Process]]:
    """A broker process; yields its address and the process."""
    process = _SPAWNED.Process(target=_serve, args=(recipe.model_dump_json(),))
    process.start()
    try:
        yield _address(recipe.folder), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join(20.0)


def _address(folder: Path) -> str:
    while not (folder / ADDRESS_FILE).exists():
        time.sleep(0.002)
    return json.loads((folder / ADDRESS_FILE).read_text())["address"]


# --- throughput --------------------------------------------------------------------------------------------


def broker_rate(durability: str, steps: int) -> Rate:
    """Payload from the actors' sockets to the learner's."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder), broker={"durability": durability})
        with broker(recipe) as (address, process):
            learner = Learner(address)
            with generating(address, learner, actors=8, tokens=TOKENS, window=4 * PER_STEP):
                learner.train(2)  # warm
                started, before = _clock(process), learner.received
                learner.train(steps)
                return Rate.of(learner.received - before, started, _clock(process))


@contextmanager
def generating(
    address: str, learner: Learner, *, actors: int, tokens: int, window: int, heartbeat_s: float = 0.02
) -> Iterator[None]:
    """A fleet of actors at work in another process."""
    learner.policy = _SPAWNED.Array("q", [0, 0], lock=False)
    learner.rewind()
    options = {
        "count": actors,
        "samples": GROUP,
        "tokens": tokens,
        "window": window,
        "heartbeat_s": heartbeat_s,
    }
    process = _SPAWNED.Process(target=actor_fleet, args=(address, learner.policy, options))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(10.0)


def relay_rate(steps: int) -> Rate:
    """The same frames through a bare relay."""
    front, back = (f"tcp://127.0.0.1:{port}" for port in _free_ports(2))
    process = _SPAWNED.Process(target=relay, args=(front, back))
    process.start()
    assignment = Assignment(
        group=GroupId(0, 0), lease=1, question={"problem": "?"}, samples=GROUP, deadline_s=1.0
    )
    frames = publish_frames(msgspec.to_builtins(assignment), "actor", GROUP, TOKENS, (0, 0))
    try:
        server = psutil.Process(process.pid)
        groups = (steps + 2) * PER_STEP
        return relay_load(front, back, frames, groups=groups, warm=2 * PER_STEP, clock=lambda: _clock(server))
    finally:
        process.terminate()
        process.join(10.0)


def _free_ports(count: int) -> list[int]:
    sockets = [zmq.Context.instance().socket(zmq.ROUTER) for _ in range(count)]
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
    for socket in sockets:
        socket.close(linger=0)
    return ports


def throughput(steps: int) -> list[dict[str, Any]]:
    """Journal on, journal off and the relay, in turn; per second, and per CPU second of the server.

    The second does not depend on who else uses the machine: it is what one whole core gives.
    """
    rates: dict[str, list[Rate]] = {"relay": [], "memory": [], "journal": []}
    for _ in range(REPEATS):
        rates["relay"].append(relay_rate(steps))
        for durability in ("memory", "journal"):
            rates[durability].append(broker_rate(durability, steps))
    wall = {name: statistics.median(rate.wall for rate in found) / 1e6 for name, found in rates.items()}
    cpu = {name: statistics.median(rate.cpu for rate in found) / 1e6 for name, found in rates.items()}
    rows = []
    for name, wanted in (("memory", ">= 0.8"), ("journal", ">= 0.5")):
        rows.append(row(f"throughput, {name}", wall[name], "MB/s", wall["relay"], wanted))
        rows.append(row(f"per CPU second, {name}", cpu[name], "MB/s", cpu["relay"], wanted))
    for what, tokens_per_s in A100_TOKENS_PER_S.items():
        fed = (
            min(wall["journal"], cpu["journal"]) * 1e6 / (8 * tokens_per_s)
        )  # id and log-probability: 8 bytes
        print(
            f"  one broker with a journal feeds {fed:,.0f} A100s ({what}: {tokens_per_s:.0f} tokens/s each)"
        )
    return rows


# --- actors ------------------------------------------------------------------------------------------------


def cpu_per_group(count: int, steps: int) -> float:
    """The broker's CPU seconds (user and system, all threads) per group that was published meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        batch = {"questions_per_step": 500, "max_staleness": 15}
        recipe = make_recipe(Path(folder), broker={"durability": "memory"}, batch=batch)
        with broker(recipe) as (address, process):
            learner = Learner(address)
            with generating(address, learner, actors=count, tokens=100, window=8000, heartbeat_s=2.0):
                learner.train(2)
                before, published = _cpu(process), _published(learner)
                learner.train(steps)
                return (_cpu(process) - before) / (_published(learner) - published)


def _published(learner: Learner) -> int:
    ledger = learner.status()["ledger"]
    return ledger["leased"] - ledger["in_flight"]


def _clock(process: psutil.Process) -> Clock:
    return Clock(time.perf_counter(), _cpu(process))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def actors(steps: int) -> list[dict[str, Any]]:
    """CPU per group by the number of actors."""
    spent: dict[int, list[float]] = {count: [] for count in FLEETS}
    for _ in range(3):
        for count in FLEETS:
            spent[count].append(cpu_per_group(count, max(8, steps // 5)))
    middle = {count: statistics.median(values) * 1e6 for count, values in spent.items()}
    return [
        row(f"CPU per group, {count} actors", middle[count], "us", middle[1], "< 1.5") for count in FLEETS[1:]
    ]


# --- memory ------------------------------------------------------------------------------------------------


def memory(steps: int) -> list[dict[str, Any]]:
    """Resident memory with a full buffer, after some steps: payload bound plus what?"""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder), batch={"questions_per_step": 512, "max_staleness": 3})
        with broker(recipe) as (address, process):
            learner = Learner(address)
            with generating(address, learner, actors=8, tokens=TOKENS, window=4 * 512):
                learner.train(max(2, steps // 20))
                while _held(learner) < 4 * 512:
                    time.sleep(0.1)
                resident = process.memory_info().rss / MIB
                payload = 4 * 512 * 8 * GROUP * TOKENS / MIB
    print(
        f"  resident {resident:.0f} MiB with 4 steps of payload ({payload:.0f} MiB): the rest must be <= 200 MiB"
    )
    return [row("memory besides the payload", resident - payload, "MiB", 200.0, "<= 1")]


def _held(learner: Learner) -> int:
    """Groups whose payload the broker holds: buffered, or taken and not committed."""
    ledger = learner.status()["ledger"]
    return ledger["buffered"] + ledger["taken"]


# --- restart -----------------------------------------------------------------------------------------------


def fill(recipe: Recipe) -> None:
    """A journal with `BUFFERED` groups of the paper's size in the buffer."""
    questions = load_training_set(recipe)
    journal = Journal(recipe.folder / JOURNAL_FOLDER)
    journal.identify(identity(recipe, questions))
    ledger = Ledger(rules_of(recipe, len(questions)))
    lengths = np.full(GROUP, TOKENS)
    for start in range(0, BUFFERED, 100):
        for group in ledger.lease("actor", 100, era=0, version=0, now=0.0):
            assignment = {"group": group.key, "lease": group.lease}
            frames = publish_frames(assignment, "actor", GROUP, TOKENS, (0, 0))
            ledger.publish(Facts(group.key, group.lease, "actor", 0, 0, 0, 0.5, int(lengths.sum()), False))
            journal.put(group.key, Entry(frames[0], frames[1:]))
        journal.save(ledger, _empty_extra(recipe) if start == 0 else None)
    journal.close()


def _empty_extra(recipe: Recipe) -> Callable[[], dict[str, Any]]:
    from broker.state import RunState
    from broker.store import MemoryStore

    return RunState(recipe, recipe.folder, [], [], MemoryStore()).extra


def ready_seconds(recipe: Recipe) -> float:
    """From the start of the process to its first answer."""
    (recipe.folder / ADDRESS_FILE).unlink(missing_ok=True)
    started = time.perf_counter()
    with broker(recipe) as (address, _):
        status = Learner(address).status()
        seconds = time.perf_counter() - started
    print(f"  ready after {seconds:.2f} s with {status['ledger']['buffered']:,} groups in the buffer")
    return seconds


def restart(steps: int) -> list[dict[str, Any]]:
    """Restart with a full journal against a start with an empty one."""
    with tempfile.TemporaryDirectory() as folder:
        batch = {"questions_per_step": BUFFERED // 4, "max_staleness": 3}
        full = make_recipe(Path(folder) / "full", batch=batch)
        empty = make_recipe(Path(folder) / "empty", batch=batch)
        fill(full)
        took = statistics.median(ready_seconds(full) for _ in range(3))
        reference = statistics.median(ready_seconds(empty) for _ in range(3))
    return [row(f"restart with {BUFFERED:,} groups", took, "s", reference, "<= 5 s")]


def row(what: str, value: float, unit: str, reference: float, wanted: str) -> dict[str, Any]:
    """Print and return a figure beside its reference."""
    ratio = value / reference
    print(
        f"{what:34} {value:10.1f} {unit:5} reference {reference:10.1f}  ratio {ratio:5.2f}  wanted {wanted}"
    )
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "reference": reference,
        "ratio": ratio,
        "wanted": wanted,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"throughput": throughput, "actors": actors, "memory": memory, "restart": restart}
    parser.add_argument("parts", nargs="*", default=list(parts))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = [line for part in options.parts for line in parts[part](options.steps)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
