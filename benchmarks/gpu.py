"""One GPU, the Qwen2.5-1.5B shape with random weights: learner, actor, weight push, peak memory.

    python -m benchmarks.gpu [--parts learner actor push] [--peak-tflops 989]

- learner: model FLOP utilisation of whole steps (plan, pack, train, metrics, snapshot) on packed responses of up
  to 4,096 tokens, bfloat16; against the peak of the data sheet and against a square matrix product that is
  measured in the same process. Model FLOPs are 6 per weight and token plus causal attention (2 L^2 hidden per
  layer forward, three times that with backward), L being a response with its prompt; recomputation earns nothing.
  Peak memory beside what `slipstream check` predicts.
- actor: `benchmarks.actor` with this model: the real actor against bare vLLM.
- push: a version of all weights to another process on the same GPU (CUDA IPC), against a plain copy of the bytes.

Where there is no GPU it says so and ends. `--device cpu --shape tiny` runs the same code in seconds, for tests:
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.process import leave

PARTS = ("learner", "actor", "push")
TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "minimath-base"
# Dense bfloat16, data sheets, TFLOP/s: the first name that occurs in the device's.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
RUN = "gpu-benchmark"


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model and the work that it is given.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, vocab, context: of the model.
        groups, mean, sigma: groups of 8 responses with log-normal lengths for the learner's step.
        budget: tokens per micro-batch.
        questions, response, sequences, kv_cache_mb: for the actor; every response has `response` tokens.
        matmul: edge of the square product.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    groups: int
    mean: float
    sigma: float
    budget: int
    questions: int
    response: int
    sequences: int
    kv_cache_mb: int
    matmul: int


SHAPES = {
    "qwen2.5-1.5b": Shape(
        28, 1536, 8960, 12, 2, 151_936, 4096, 32, 1500.0, 0.8, 8192, 128, 1024, 256, 32_768, 8192
    ),
    "tiny": Shape(2, 128, 256, 4, 2, 512, 256, 4, 60.0, 0.8, 512, 4, 16, 32, 64, 256),
}


def main() -> int:
    """Run the parts one after the other, each in processes of its own."""
    options = _options()
    if options.device == "cuda" and not _has_gpu():
        print("error: benchmarks.gpu needs a GPU, and torch finds none here.", file=sys.stderr)
        return 2
    shape = SHAPES[options.shape]
    if options.one:
        print(json.dumps({"learner": _learner, "push": _push}[options.one](options, shape)))
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        _make_model(shape, Path(folder), options.dtype)
        for part in options.parts:
            command = _actor_command if part == "actor" else _own_command
            subprocess.run(command(part, folder, options, shape), check=True, env=_environment(options))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the data sheet; known for " + ", ".join(PEAKS))
    parser.add_argument("--one", choices=("learner", "push"), help="internal: one part, in this process")
    parser.add_argument("--model", help="internal: folder of the model")
    options = parser.parse_args()
    options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _environment(options: argparse.Namespace) -> dict[str, str]:
    hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **hidden}


def _own_command(part: str, folder: str, options: argparse.Namespace, shape: Shape) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", part, "--model", folder]
    command += ["--device", options.device, "--shape", options.shape, "--repeats", str(options.repeats)]
    return command + (["--peak-tflops", str(options.peak_tflops)] if options.peak_tflops else [])


def _actor_command(part: str, folder: str, options: argparse.Namespace, shape: Shape) -> list[str]:
    settings = {
        "model": folder,
        "dtype": options.dtype,
        "questions": shape.questions,
        "sequences": shape.sequences,
        "max-tokens": shape.response,
        "max-context": shape.context,
        "kv-cache-mb": shape.kv_cache_mb,
        "repeats": options.repeats,
    }
    command = [sys.executable, "-m", "benchmarks.actor"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return command if options.device == "cpu" else [*command, "--all-cores"]


def _make_model(shape: Shape, folder: Path, dtype: str) -> None:
    """Random weights, and a tokenizer whose end token they hardly ever draw."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)


# --- learner ----------------------------------------------------------------------------------------------


def _learner(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig

    from benchmarks.learner import LearnerLoop, bench_recipe, build, make_batch, samples_of
    from common.model_files import read_shape
    from deploy.memory import learner_memory
    from learner.ranks import leave_ranks, start_ranks

    folder = Path(options.model)
    sizes, config = read_shape(options.model), AutoConfig.from_pretrained(folder)
    recipe = bench_recipe(folder, shape.budget, 1, shape.context - 40, shape.groups)
    model = recipe.model.model_copy(update={"dtype": options.dtype})
    recipe = recipe.model_copy(update={"model": model})
    ranks = start_ranks(60.0)
    batch, payloads = make_batch(shape.groups, shape.mean, shape.sigma, shape.context - 40, shape.vocab)
    lengths = [sample.length for sample in samples_of(batch, payloads)]
    product = _matmul_flops_per_s(shape.matmul, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    learner = LearnerLoop(build(config).to(getattr(torch, options.dtype)), recipe, sizes, ranks)
    seconds = _seconds(lambda: learner.step(batch, payloads), options)
    flops = _model_flops(lengths, sizes) / seconds
    peak = _peak_flops_per_s(options)
    predicted = learner_memory(recipe, sizes, "gpu" if options.device == "cuda" else "cpu")
    learner.engine.close()
    leave_ranks(ranks)
    return {
        "part": "learner",
        "tokens_per_s": round(sum(lengths) / seconds),
        "tflops": round(flops / 1e12, 3),
        "mfu": None if peak is None else round(flops / peak, 3),
        "to_matmul": round(flops / product, 3),
        "peak_memory_gib": round(_peak_bytes(options) / 2**30, 2),
        "predicted_gib": round(predicted.total / 2**30, 2),
    }


def _model_flops(lengths: list[int], sizes: Any) -> float:
    """Forward and backward; the embedding is a lookup, the tied head a product."""
    per_token = 6.0 * (sizes.layers * sizes.layer_parameters + sizes.vocab * sizes.hidden)
    per_square = 6.0 * sizes.layers * sizes.heads * sizes.head_dim
    return sum(per_token * length + per_square * length**2 for length in lengths)


def _matmul_flops_per_s(edge: int, options: argparse.Namespace) -> float:
    import torch

    square = torch.randn(edge, edge, device=options.device, dtype=getattr(torch, options.dtype))
    times = 10

    def multiply() -> None:
        for _ in range(times):
            square @ square

    return times * 2.0 * edge**3 / _seconds(multiply, options)


def _seconds(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Median over the repeats, after one that does not count."""
    import torch

    seconds = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _peak_flops_per_s(options: argparse.Namespace) -> float | None:
    import torch

    if options.peak_tflops is not None:
        return options.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def _peak_bytes(options: argparse.Namespace) -> float:
    import torch

    if options.device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- weight push ------------------------------------------------------------------------------------------


def _push(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Seconds from `publish` until the other process holds a checked copy."""
    from common.weights import Publisher, Snapshot

    device, route = ("cuda:0", "ipc") if options.device == "cuda" else ("cpu", "gloo")
    weights = _weights(options, device)
    publisher = Publisher(run_id=RUN, route=route, device=device, checksum_every=0)
    # CUDA does not survive a fork.
    peer = multiprocessing.get_context("spawn").Process(
        target=_receive, args=(publisher.address, device), daemon=True
    )
    peer.start()
    try:
        _until(lambda: publisher.meters()["links"] == 1)
        seconds = []
        for version in range(1, options.repeats + 2):
            snapshot = Snapshot.from_tensors(iter(weights.items()), bucket_bytes=256 << 20, device=device)
            started = time.perf_counter()
            publisher.publish(version, snapshot)
            _until(lambda version=version: version in publisher.versions_acked().values())
            seconds.append(time.perf_counter() - started)
        nbytes = snapshot.nbytes
    finally:
        peer.kill()
        peer.join()
        publisher.close()
    push, copy = statistics.median(seconds[1:]), _copy_seconds(weights, options)
    figures = {"gigabytes": nbytes / 1e9, "seconds": push, "copy_seconds": copy, "to_copy": copy / push}
    return {"part": "push", "route": route} | {name: round(value, 4) for name, value in figures.items()}


def _weights(options: argparse.Namespace, device: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    return {name: tensor.detach().to(device) for name, tensor in model.named_parameters()}


def _copy_seconds(weights: dict[str, Any], options: argparse.Namespace) -> float:
    import torch

    twins = [torch.empty_like(tensor) for tensor in weights.values()]

    def copy() -> None:
        for twin, tensor in zip(twins, weights.values(), strict=True):
            twin.copy_(tensor)

    return _seconds(copy, options)


def _receive(address: str, device: str) -> None:
    from common.weights.scripted import ScriptedReceiver

    ScriptedReceiver(address, RUN, "receiver", device=device).run()


def _until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"benchmarks.gpu: the weight push was not over after {seconds:g} s")
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
