"""Tiny models, quickly started engines and Hugging Face references for the weight-push tests."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.weights import WEIGHT_WORKER_EXTENSION, VersionSpan
from actors.weights.versions import labels_tokens

VOCABULARY = 128
UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def tiny_model(seed: int, *, tied: bool, hidden: int = 128, layers: int = 2) -> torch.nn.Module:
    """A random Qwen2 in float32 whose next-token distributions are far from uniform and differ by seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).eval()


@asynccontextmanager
async def running_engine(folder: Path, *, tensor_parallel: int = 1, **extra: object) -> AsyncIterator:
    """An AsyncLLM on the model in `folder`, shut down on exit. Started by fork: seconds, not half a minute."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from actors.engine import KEEPING_SCHEDULER

    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "worker_extension_cls": WEIGHT_WORKER_EXTENSION,
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": tensor_parallel,
        "disable_log_stats": True,
        **({"scheduler_cls": KEEPING_SCHEDULER} if labels_tokens() else {}),  # as in an actor
    } | extra
    if tensor_parallel == 1:
        arguments["distributed_executor_backend"] = UNIPROC
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else each worker wants a NUMA node of its own
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    config = AsyncEngineArgs(**arguments).create_engine_config()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # after the configuration, which forces spawn on CPU
    engine = AsyncLLM.from_vllm_config(config)
    try:
        yield engine
    finally:
        engine.shutdown()


@dataclass
class Response:
    """A finished request: its prompt, tokens, their behaviour log-probabilities and versions."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]
    finish_reason: str


async def respond(
    engine,
    receiver,
    name: str,
    prompt: Sequence[int],
    length: int,
    temperature: float = 1.0,
    *,
    salted: bool = True,
) -> Response:
    """Samples exactly `length` tokens, as an actor does (`salted` = False: without the cache salt)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=temperature,
        max_tokens=length,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    text: dict = {"prompt_token_ids": list(prompt)}
    if receiver is not None:
        receiver.token_versions.begin(name)
        if salted and receiver.cache_salt is not None:
            text["cache_salt"] = receiver.cache_salt
    lora = receiver.lora if receiver is not None else None
    async for output in engine.generate(text, parameters, name, lora_request=lora):
        final = output
    completion = final.outputs[0]
    tokens = list(completion.token_ids)
    chosen = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
    spans = receiver.token_versions.spans(name, completion) if receiver is not None else []
    return Response(list(prompt), tokens, chosen, spans, completion.finish_reason)


def prompts(count: int, seed: int = 0) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        yield torch.randint(2, VOCABULARY, (8 + index % 5,), generator=generator).tolist()


@torch.no_grad()
def token_logprobs(model: torch.nn.Module, response: Response, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token under `model` given all tokens before it, shape (T,).

    In float64: what then differs is the engine's own rounding, which depends on the machine's kernels.
    """
    ids = torch.tensor([response.prompt + response.tokens])
    logits = copy.deepcopy(model).double()(ids).logits[0, len(response.prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response.tokens)[:, None])[:, 0]


async def until(condition, timeout: float = 240.0) -> None:
    """Waits for a condition; a failure here is a failure of the test, with its stack."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - conditions of other processes
            await asyncio.sleep(0.01)
