"""The actor against bare vLLM: the same questions, sampling, engine settings and cores.

    python -m benchmarks.actor [--model models/minimath-base] [--questions 512] [--repeats 3]

The reference is vLLM's offline `LLM.generate` on a list of all prompts: `bare` as a user writes it, with vLLM's
defaults (engine in a process of its own, text and log-probabilities of every token as Python objects); `lean` is
the least that vLLM can be made to do (engine in the same process, no incremental text, flat log-probabilities).
The actor is the real process: it leases from a real broker in this process, samples, verifies, publishes, waits
for the answers; what it does beyond `lean` includes moving every token's log-probability between two processes.

Each side is a process of its own on one core; the broker is on another (`--all-cores`: wherever there is room). Figures are generated tokens per second
of processor time of all processes of a side, which on a core of their own is tokens per second; wall-clock
figures are given too. Ratios are of medians over the repeats, sides taking turns.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.bare_engine import bare_arguments
from common.messages import Hello, StatusQuery
from common.recipe import Recipe
from common.wire import Client

GROUP = 8
DONE = ("buffered", "filtered")


class Figure(NamedTuple):
    """Generated tokens, seconds of processor time, seconds on the wall."""

    tokens: int
    cpu_s: float
    wall_s: float


def main() -> None:
    """Measure both sides in turn and print one line of JSON per figure."""
    options = _options()
    if options.side:
        print(json.dumps(_reference(options, lean=options.side == "lean")))
        return
    sides: dict[str, Callable[[], Figure]] = {
        "bare": lambda: _measure_reference(options, "bare"),
        "lean": lambda: _measure_reference(options, "lean"),
        "actor": lambda: _measure_actor(options),
    }
    found: dict[str, list[Figure]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, measure in sides.items():
            found[name].append(measure())
            print(json.dumps({"side": name, **found[name][-1]._asdict()}), flush=True)
    rates = {name: _median(f.tokens / f.cpu_s for f in figures) for name, figures in found.items()}
    walls = {name: _median(f.tokens / f.wall_s for f in figures) for name, figures in found.items()}
    for reference in ("bare", "lean"):
        figure = {
            "reference": reference,
            "ratio_cpu": round(rates["actor"] / rates[reference], 3),
            "ratio_wall": round(walls["actor"] / walls[reference], 3),
        }
        print(json.dumps(figure))
    print(json.dumps({"tokens_per_cpu_s": {name: round(rate) for name, rate in rates.items()}}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="models/minimath-base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--kv-cache-mb", type=int, default=512)
    parser.add_argument("--train", default="orz-mini", help="question set")
    parser.add_argument("--template", default="no")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all-cores", action="store_true", help="pin nothing: for a GPU")
    parser.add_argument("--side", choices=("bare", "lean"), help="internal: one reference measurement")
    return parser.parse_args()


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


# --- the reference ----------------------------------------------------------------------------------------


def _measure_reference(options: argparse.Namespace, side: str) -> Figure:
    arguments = [sys.executable, "-m", "benchmarks.actor", *sys.argv[1:], "--side", side]
    out = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        check=True,
        env=_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(side == "bare"))},
        preexec_fn=None if options.all_cores else _use_first_core,
    )
    return Figure(*json.loads(out.stdout.splitlines()[-1]))


def _reference(options: argparse.Namespace, *, lean: bool) -> Figure:
    from vllm import LLM, SamplingParams

    recipe = _recipe(options, Path("."))
    prompts = _prompts(recipe)
    engine = LLM(**bare_arguments(recipe))
    more: dict[str, Any] = {"detokenize": False, "flat_logprobs": True} if lean else {}
    sampling = SamplingParams(n=GROUP, temperature=1.0, max_tokens=options.max_tokens, logprobs=0, **more)
    engine.generate(prompts[:8], sampling, use_tqdm=False)
    me = psutil.Process()
    cpu, wall = _cpu_seconds(me), time.monotonic()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return Figure(tokens, _cpu_seconds(me) - cpu, time.monotonic() - wall)


def _prompts(recipe: Recipe) -> list[Any]:
    from transformers import AutoTokenizer
    from vllm.inputs import TokensPrompt

    from actors.prompts import Prompts
    from common.tasks.from_recipe import training_questions
    from common.tasks.templates import get_template

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    encode = Prompts(tokenizer, get_template(recipe.data.template, model=recipe.model.path)).encode
    return [TokensPrompt(prompt_token_ids=encode(row["problem"])) for row in training_questions(recipe)]


# --- the actor --------------------------------------------------------------------------------------------


def _measure_actor(options: argparse.Namespace) -> Figure:
    from tests.scripted.broker import running_broker

    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(options, Path(folder))
        if not options.all_cores:
            _use_last_core()
        with running_broker(recipe) as address:
            actor = subprocess.Popen(
                [sys.executable, "-m", "actors.main", address, "actor"],
                env=_environment(),
                stderr=subprocess.DEVNULL,
                preexec_fn=None if options.all_cores else _use_first_core,
            )
            try:
                return _watch(address, psutil.Process(actor.pid), options.questions)
            finally:
                actor.terminate()
                actor.wait(30)


def _watch(address: str, actor: psutil.Process, groups: int) -> Figure:
    """From the first lease to the last answer of the broker."""
    hello = Hello(role="observer", peer="benchmark", software="0", host="here", pid=os.getpid())
    client = Client(address, hello)
    client.connect()
    cpu, wall = 0.0, 0.0
    before: dict[str, float] = {}
    while True:
        status = client.request(StatusQuery()).message.status  # type: ignore[attr-defined]
        ledger = status["ledger"]
        if not wall and status["first_lease_time"]:
            cpu, wall = _cpu_seconds(actor), time.monotonic()
            before = _by_process(actor)
        if sum(ledger[name] for name in DONE) >= groups:
            break
        time.sleep(0.02)
    figure = Figure(status["peers"]["actor"]["tokens"], _cpu_seconds(actor) - cpu, time.monotonic() - wall)
    after = _by_process(actor)
    shares = {name: round(seconds - before.get(name, 0.0), 2) for name, seconds in after.items()}
    print(json.dumps({"actor_cpu_s": shares}))
    client.close()
    return figure


def _by_process(actor: psutil.Process) -> dict[str, float]:
    """Processor seconds of the actor's processes: itself, the engine, and the verifier's."""
    seconds = {"front": sum(actor.cpu_times()[:2]), "engine": 0.0, "verifier": 0.0}
    for child in actor.children(recursive=True):
        kind = "verifier" if "multiprocessing" in " ".join(child.cmdline()) else "engine"
        seconds[kind] += sum(child.cpu_times()[:2])
    return seconds


def _cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process and its children so far."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)


# --- common to both ---------------------------------------------------------------------------------------


def _recipe(options: argparse.Namespace, folder: Path) -> Recipe:
    """A run whose broker hands out all questions at once and whose learner never comes."""
    return Recipe.model_validate(
        {
            "run": {"name": "benchmark", "root": folder, "steps": 1},
            "model": {
                "path": str(Path(options.model).resolve()) if Path(options.model).exists() else options.model,
                "dtype": options.dtype,
                "max_context": options.max_context,
            },
            "data": {
                "train": options.train,
                "template": options.template,
                "limit": options.questions,
                "max_epochs": 1,
            },
            "rollout": {"group_size": GROUP, "max_tokens": options.max_tokens},
            "batch": {"questions_per_step": options.questions, "optimizer_steps": 1, "max_staleness": 0},
            "actor": {
                "max_sequences": options.sequences,
                "kv_cache_mb": options.kv_cache_mb,
                "threads": 1,
            },
            "broker": {"durability": "memory"},
            "eval": {"every": 1_000_000},
        }
    )


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def _use_first_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0) | {0})})


def _use_last_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()
