"""How fast weights reach receivers, and how long generation stands still, against references of the same run.

    python -m benchmarks.weights [transfer publish fanout steps stop] [--megabytes 400] [--json FILE]

transfer  bytes/s of a push to one receiver, against a raw two-rank gloo broadcast of the same buckets
publish   seconds that `take_snapshot` + `publish` take of the learner, against one copy of the same tensors
fanout    the learner's own sending seconds for 16 receivers, against those for 2
steps     the learner's slowest step while receivers are killed and frozen, against its slowest undisturbed
stop      milliseconds that generation stands still, against vLLM's own empty pause and the decode step
          (10 MB), or against bytes / memcpy bandwidth (400 MB)

Invariant: every figure is printed beside a reference taken in turns with it in the same run, and their ratio. Times
are medians of several repetitions; bandwidths are the best of them, for both sides, since whatever else runs on the
machine can only slow a transfer down.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.weights import Publisher, Snapshot
from common.weights.group import Group
from common.weights.layout import DEFAULT_BUCKET_BYTES
from common.weights.scripted import ScriptedReceiver
from common.weights.store import Address, connect, serve_store
from learner.snapshot import take_snapshot

MB = 1_000_000
REPEATS = 5
DEADLINE_S = 60.0
RUN = "benchmark"
STRIKES = {6: (0, signal.SIGKILL), 12: (1, signal.SIGSTOP), 24: (2, signal.SIGSTOP), 30: (1, signal.SIGCONT)}
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["torch", "common.weights.scripted"])


class Layers(torch.nn.Module):
    """`megabytes` of float32 in matrices of a transformer's size."""

    def __init__(self, megabytes: float) -> None:
        super().__init__()
        side = 1024 if megabytes > 50 else 256
        count = max(1, round(megabytes * MB / (4 * side * side)))
        torch.manual_seed(0)
        self.layers = torch.nn.ParameterList(torch.randn(side, side) for _ in range(count))


def median(repeat: Callable[[], float], count: int = REPEATS) -> float:
    """Median of `count` measurements after one that is thrown away."""
    repeat()
    return statistics.median(repeat() for _ in range(count))


def row(name: str, value: float, reference: float, unit: str, bound: str) -> dict[str, Any]:
    """One line of the result: value, its reference and their ratio, with the bound that is aimed at."""
    result = {"name": name, "value": value, "reference": reference, "unit": unit, "ratio": value / reference}
    print(
        f"{name:34} {value:10.3f} {unit:7} reference {reference:10.3f}  ratio {value / reference:6.3f}  {bound}"
    )
    return result


# -------------------------------------------------------------------- receivers in processes


def _receive(address: str, name: str) -> None:
    ScriptedReceiver(address, RUN, name, node=name, deadline_s=DEADLINE_S).run()


@contextmanager
def receivers(publisher: Publisher, count: int) -> Iterator[list[Any]]:
    """`count` scripted receivers in processes of their own, connected."""
    started = [
        _FORKED.Process(target=_receive, args=(publisher.address, f"r{index}"), daemon=True)
        for index in range(count)
    ]
    for process in started:
        process.start()
    try:
        _await(lambda: publisher.meters()["links"] == count)
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def _await(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a benchmark's receiver did not answer")
        time.sleep(0.002)


def push(publisher: Publisher, version: int, snapshot: Snapshot, count: int) -> None:
    """Publishes and waits until all `count` receivers hold the version."""
    publisher.publish(version, snapshot)
    _await(lambda: list(publisher.versions_acked().values()) == [version] * count)


# -------------------------------------------------------------------- transfer


def transfer(megabytes: float) -> list[dict[str, Any]]:
    """A push (offer to staged, as the receiver sees it) against broadcasts of ready buffers."""
    model = Layers(megabytes)
    publisher = Publisher(run_id=RUN, deadline_s=DEADLINE_S, checksum_every=0)
    versions = iter(range(1000))
    nbytes = take_snapshot(model).nbytes
    pushed, raw = [], []
    with receivers(publisher, 1), raw_pair(nbytes) as broadcast_all:

        def one_push() -> float:
            push(publisher, next(versions), take_snapshot(model), 1)
            return publisher.meters()["staged_s"]["r0"]

        for _ in range(2 * REPEATS):  # in turns: the load of the machine changes
            raw.append(broadcast_all())
            pushed.append(one_push())
    publisher.close()
    rates = [nbytes / MB / min(seconds) for seconds in (pushed, raw)]
    return [row(f"push of {megabytes:g} MB", *rates, "MB/s", "aim >= 0.8")]


@contextmanager
def raw_pair(nbytes: int) -> Iterator[Callable[[], float]]:
    """Two gloo ranks with warm buffers; calling it broadcasts `nbytes` and returns the receiver's seconds."""
    store, port = serve_store("127.0.0.1", 0, RUN)
    address = Address("gloo", "127.0.0.1", port, "raw")
    ours, theirs = _FORKED.Pipe()
    peer = _FORKED.Process(target=_raw_peer, args=(str(address), nbytes, theirs), daemon=True)
    peer.start()
    group = Group(connect(address, DEADLINE_S), "raw", 0, 2, "cpu", DEADLINE_S, "127.0.0.1")
    buffers = _buffers(nbytes)

    def broadcast_all() -> float:
        ours.send(True)
        ours.recv()
        for buffer in buffers:
            group.broadcast(buffer, DEADLINE_S)
        return ours.recv()

    try:
        yield broadcast_all
    finally:
        peer.kill()
        peer.join()
        group.close()
        del store


def _raw_peer(address: str, nbytes: int, pipe: Any) -> None:
    parsed = Address.parse(address)
    group = Group(connect(parsed, DEADLINE_S), "raw", 1, 2, "cpu", DEADLINE_S, "127.0.0.1")
    buffers = _buffers(nbytes)
    while pipe.recv():
        pipe.send("ready")
        started = time.perf_counter()
        for buffer in buffers:
            group.broadcast(buffer, DEADLINE_S)
        pipe.send(time.perf_counter() - started)


def _buffers(nbytes: int) -> list[torch.Tensor]:
    count = -(-nbytes // DEFAULT_BUCKET_BYTES)
    return [torch.zeros(nbytes // count, dtype=torch.uint8) for _ in range(count)]


# -------------------------------------------------------------------- publish


def publish(megabytes: float) -> list[dict[str, Any]]:
    """The learner's share of a push against a plain copy of every parameter."""
    model = Layers(megabytes)
    publisher = Publisher(run_id=RUN, deadline_s=DEADLINE_S, checksum_every=0)
    versions = iter(range(1000))
    seconds: dict[str, list[float]] = {"publish": [], "copy": []}
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        publisher.publish(next(versions), take_snapshot(model))
        seconds["publish"].append(time.perf_counter() - started)
        started = time.perf_counter()
        copies = [parameter.detach().clone() for parameter in model.parameters()]
        seconds["copy"].append(time.perf_counter() - started)
        del copies
    publisher.close()
    taken, copied = (statistics.median(values[1:]) * 1e3 for values in seconds.values())
    return [row(f"publish of {megabytes:g} MB", taken, copied, "ms", "aim ~ 1: one copy")]


# -------------------------------------------------------------------- fan-out


def fanout(megabytes: float) -> list[dict[str, Any]]:
    """The learner's own sending seconds with 16 receivers against 2 (degree 2)."""
    few, many = (_sending_seconds(megabytes, count) * 1e3 for count in (2, 16))
    return [row(f"sending {megabytes:g} MB to 16 receivers", many, few, "ms", "aim <= 1.5 of 2 receivers")]


def _sending_seconds(megabytes: float, count: int) -> float:
    model = Layers(megabytes)
    publisher = Publisher(run_id=RUN, degree=2, deadline_s=DEADLINE_S, checksum_every=0)
    versions = iter(range(1000))

    def one_push() -> float:
        push(publisher, next(versions), take_snapshot(model), count)
        return publisher.meters()["send_s"]

    with receivers(publisher, count):
        seconds = median(one_push)
    publisher.close()
    return seconds


# -------------------------------------------------------------------- steps


def steps(megabytes: float) -> list[dict[str, Any]]:
    """Slowest step (arithmetic, snapshot, publish) with 4 receivers, quiet and under blows."""
    quiet, struck = (_slowest_step(megabytes, blows=blows) * 1e3 for blows in (False, True))
    return [row("slowest step, receivers struck", struck, quiet, "ms", "aim: at most 100 ms more")]


def _slowest_step(megabytes: float, *, blows: bool) -> float:
    model = Layers(megabytes)
    publisher = Publisher(run_id=RUN, degree=2, deadline_s=3.0, checksum_every=0)
    work = torch.randn(700, 700)
    slowest = 0.0
    with receivers(publisher, 4) as processes:
        for step in range(40):
            if blows and step in STRIKES:
                process = processes[STRIKES[step][0]]
                os.kill(process.pid, STRIKES[step][1])
            started = time.perf_counter()
            for _ in range(3):
                work = torch.tanh(work @ work)
            publisher.publish(step, take_snapshot(model))
            if step >= 3:  # the first ones build groups and memory
                slowest = max(slowest, time.perf_counter() - started)
            time.sleep(0.1)
    publisher.close()
    return slowest


# -------------------------------------------------------------------- stop


def stop() -> list[dict[str, Any]]:
    """Generation stopped by a push under load: a 10 MB and a 400 MB model on the real engine."""
    return asyncio.run(_stop(hidden=256, layers=3)) + asyncio.run(_stop(hidden=1024, layers=8))


async def _stop(hidden: int, layers: int) -> list[dict[str, Any]]:
    from actors.weights import WEIGHT_WORKER_EXTENSION, WeightReceiver

    model = _language_model(hidden, layers)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = _engine(folder, WEIGHT_WORKER_EXTENSION)
        publisher = Publisher(run_id=RUN, deadline_s=DEADLINE_S, checksum_every=0)
        receiver = WeightReceiver(
            engine,
            actor_id="a",
            run_id=RUN,
            address=publisher.address,
            clear_cache=False,
            deadline_s=DEADLINE_S,
        )
        following = asyncio.create_task(receiver.run())
        ticks: list[float] = []
        load = [asyncio.create_task(_generate(engine, f"r{i}", ticks if i == 0 else None)) for i in range(8)]
        await asyncio.sleep(1.0)
        pauses = [await _empty_pause(engine) for _ in range(REPEATS + 1)]
        stops = [await _stopped_by_push(publisher, receiver, model, v) for v in range(1, REPEATS + 2)]
        following.cancel()
        for task in load:
            task.cancel()
        engine.shutdown()
        publisher.close()
    return _stop_rows(
        nbytes, statistics.median(stops[1:]), statistics.median(pauses[1:]), _median_step(ticks)
    )


def _stop_rows(nbytes: int, stopped: float, pause: float, step: float) -> list[dict[str, Any]]:
    name = f"stopped by {nbytes / MB:.0f} MB, beyond the pause"
    print(f"{'':34} stopped {stopped:.1f} ms, vLLM's empty pause {pause:.1f} ms, decode step {step:.1f} ms")
    if nbytes < 50 * MB:
        return [row(name, stopped - pause, step, "ms", "aim <= 2 decode steps")]
    return [row(name, stopped - pause, nbytes / memcpy_bandwidth() * 1e3, "ms", "aim <= 3 copies")]


def memcpy_bandwidth() -> float:
    """Bytes/s of copying 256 MB from warm memory to warm memory."""
    source, target = (torch.zeros(256 * MB, dtype=torch.uint8) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started

    return source.numel() / median(once)


def _language_model(hidden: int, layers: int) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _engine(folder: str, extension: str) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    arguments = AsyncEngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=512 << 20,
        worker_extension_cls=extension,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        disable_log_stats=True,
    )
    config = arguments.create_engine_config()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return AsyncLLM.from_vllm_config(config)


async def _generate(engine: Any, name: str, ticks: list[float] | None) -> None:
    """Decodes without end; notes when each token of this request came."""
    from vllm import SamplingParams

    for turn in range(1000):
        parameters = SamplingParams(max_tokens=2000, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": list(range(2, 20))}
        async for _ in engine.generate(prompt, parameters, f"{name}-{turn}"):
            if ticks is not None:
                ticks.append(time.perf_counter())


def _median_step(ticks: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(ticks)) * 1e3


async def _empty_pause(engine: Any) -> float:
    """Milliseconds of a pause and resume with nothing in between, under the same load."""
    await asyncio.sleep(0.2)
    started = time.perf_counter()
    await engine.pause_generation(mode="keep", clear_cache=False)
    await engine.resume_generation()
    return (time.perf_counter() - started) * 1e3


async def _stopped_by_push(
    publisher: Publisher, receiver: Any, model: torch.nn.Module, version: int
) -> float:
    publisher.publish(version, take_snapshot(model))
    while publisher.versions_acked().get("a") != version:  # noqa: ASYNC110 - the publisher has no event
        await asyncio.sleep(0.01)
    return receiver.meters()["stopped_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["transfer", "publish", "fanout", "steps", "stop"])
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "transfer": lambda: transfer(chosen.megabytes),
        "publish": lambda: publish(chosen.megabytes),
        "fanout": lambda: fanout(min(chosen.megabytes, 100.0)),
        "steps": lambda: steps(min(chosen.megabytes, 100.0)),
        "stop": stop,
    }
    rows = [line for part in chosen.parts for line in parts[part]()]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
