"""A vLLM engine as the actor sees it: token ids in, samples out.

Invariant (I6): what is recorded is what was sampled. Log-probabilities are those of the distribution that each
token was drawn from (`processed_logprobs`: after the temperature; top-p, top-k and penalties are off), token
ids are the engine's own (never text encoded again), the stop token is one of them, and every token carries the
version of the weights that drew it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import threading
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actors.failure import EngineErrors
from actors.weights import WEIGHT_WORKER_EXTENSION
from actors.weights.versions import labels_tokens
from common.errors import RunFailedError, SlipstreamError
from common.messages import VersionRun
from common.recipe import Recipe

log = logging.getLogger("slipstream.actor.engine")

CPU_KV_CACHE_MB = 1024
CPU_BLOCK_TOKENS = 32  # vLLM takes 128 on the CPU: longer than many prompts, which then share nothing
# Not where vLLM schedules asynchronously, as it does on GPUs: never tried there. Nor on a vLLM whose tokens are
# labelled by counting those that have arrived.
KEEPING_SCHEDULER = "actors.scheduler.KeepingScheduler"
LIVENESS_S = 0.5
DEATH_S = 0.5  # for the exit code of a process whose connection has just closed
DEATHS = {
    "SIGILL": ': an instruction that this processor lacks; model.dtype = "float32" may avoid it',
    "SIGKILL": ": often the kernel's, for want of memory",
}


class EngineLostError(SlipstreamError):
    """The engine process is gone; this actor cannot go on, a fresh one can."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response.

    Attributes:
        tokens: int32 [T], with the stop token where there is one.
        logprobs: float32 [T], nats, under the distribution that was sampled from.
        versions: (version, count) runs that add up to T.
        finish: `stop` by end-of-sequence token or stop string, `length` by budget or context.
        text: what the verifier reads: special tokens left out, a stop string left in only on request.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: list[VersionRun]
    finish: Literal["stop", "length"]
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: temperature 0 is greedy; `max_tokens` is the budget; `stop` strings end a response."""

    temperature: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    seed: int | None = None


def engine_arguments(recipe: Recipe, name: str) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs` for an actor called `name`."""
    actor = recipe.actor
    arguments: dict[str, Any] = {
        "model": recipe.model.path,
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "max_model_len": recipe.model.max_context,
        "max_num_seqs": actor.max_sequences,
        "tensor_parallel_size": actor.tensor_parallel,
        "gpu_memory_utilization": actor.gpu_memory_utilization,
        "enable_prefix_caching": actor.prefix_caching,
        "enforce_eager": actor.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WEIGHT_WORKER_EXTENSION,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,  # their per-token bookkeeping was seen to cost 10 % of the actor's tokens/s
        "seed": sampler_seed(recipe.run.seed, name),
    }
    if actor.kv_cache_mb is not None:
        arguments["kv_cache_memory_bytes"] = actor.kv_cache_mb << 20
    if recipe.lora is not None and recipe.lora.push == "adapter":
        arguments |= {"enable_lora": True, "max_lora_rank": recipe.lora.rank, "max_loras": 1}
    return arguments


def sampler_seed(run_seed: int, name: str) -> int:
    """Seed of an engine's sampler: actors of one run must not draw the same random numbers."""
    return zlib.crc32(f"{run_seed}/{name}".encode())


class Engine:
    """An AsyncLLM whose process is tied to this one. Build it before any event loop or thread is started."""

    def __init__(self, **arguments: Any) -> None:
        """Start the engine process; blocks until the model is loaded.

        Args:
            arguments: of `AsyncEngineArgs`; `disable_log_stats` and the executor are filled in.

        Raises:
            RunFailedError: vLLM could not start it; its own words are on standard error.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        _silence_imports()
        from vllm import AsyncEngineArgs

        from actors.executors import ACTOR_PID_VARIABLE, OwnedLLM

        os.environ[ACTOR_PID_VARIABLE] = str(os.getpid())
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the recipe
        with EngineErrors() as errors:
            try:
                config = AsyncEngineArgs(**for_this_device(arguments)).create_engine_config()
                if _fork_is_safe(config):
                    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
                self.llm = OwnedLLM.from_vllm_config(config, disable_log_stats=True)
            except Exception as error:
                reason = errors.reason(error)
                raise RunFailedError(f"vLLM could not start on '{arguments['model']}': {reason}") from error
        self.max_context: int = config.model_config.max_model_len
        self._processes = list(self.llm.engine_core.resources.engine_manager.processes)
        self._numbers = itertools.count()

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        cache = self.llm.vllm_config.cache_config
        return (cache.num_gpu_blocks or 0) * cache.block_size

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers)."""
        return self.llm.get_tokenizer()

    @property
    def unfinished(self) -> int:
        """Sequences that run or wait in the engine."""
        return self.llm.get_num_unfinished_requests()

    @property
    def running_tokens(self) -> int:
        """Tokens sampled so far of the sequences that still run; a few steps old, see `actors.scheduler`."""
        states = self.llm.output_processor.request_states.values()
        return sum(_sampled(state) for state in states)

    @property
    def kv_use(self) -> float:
        """Share of the KV cache that running sequences fill, 0..1; a prompt that samples share counts for each.

        A few steps old: see `actors.scheduler`.
        """
        states = self.llm.output_processor.request_states.values()
        made = [(state.prompt_len, _sampled(state)) for state in states]
        tokens = sum(prompt + new for prompt, new in made if new)  # those without a token still wait
        return min(1.0, tokens / max(1, self.kv_cache_tokens))

    async def warm_up(self, version: int = 0) -> None:
        """Name the weights that the engine was started with, and generate one token with them."""
        await self.llm.update_weight_version(str(version))
        await self.generate([0], 1, Sampling(0.0, 1))

    async def generate(
        self,
        prompt: Sequence[int],
        samples: int,
        sampling: Sampling,
        *,
        cache_salt: str | None = None,
        lora: Any | None = None,
    ) -> list[Sample]:
        """Sample `samples` responses to one prompt, which they share in the prefix cache.

        Cancelling the call aborts them in the engine.

        Raises:
            EngineLostError: the engine process is gone.
        """
        final = await self._answer(prompt, _parameters(samples, sampling), cache_salt, lora)
        return [self._sample(completion, bool(sampling.stop)) for completion in final.outputs]

    async def score(
        self, tokens: Sequence[int], *, cache_salt: str | None = None, lora: Any | None = None
    ) -> np.ndarray:
        """[n - 1] float32: log-probability of each of n tokens but the first given those before it, at temperature 1.

        Raises:
            EngineLostError: the engine process is gone.
        """
        final = await self._answer(tokens, _scoring(), cache_salt, lora)
        return np.asarray(final.prompt_logprobs.logprobs, dtype=np.float32)

    async def _answer(
        self, prompt: Sequence[int], parameters: Any, cache_salt: str | None, lora: Any | None
    ) -> Any:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        # A ready-made input enters the engine at once; a plain prompt would take a detour over a thread.
        request = tokens_input(list(prompt), cache_salt=cache_salt)
        final = None
        try:
            async for output in self.llm.generate(
                request, parameters, f"r{next(self._numbers)}", lora_request=lora
            ):
                final = output
        except EngineDeadError:
            raise self._lost() from None
        assert final is not None
        return final

    def _sample(self, completion: Any, has_text: bool) -> Sample:
        tokens = np.asarray(completion.token_ids, dtype=np.int32)
        text = (
            completion.text if has_text else self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        )
        return Sample(
            tokens=tokens,
            logprobs=np.asarray(completion.logprobs.logprobs[: len(tokens)], dtype=np.float32),
            versions=_version_runs(completion),
            finish="stop" if completion.finish_reason == "stop" else "length",
            text=text,
        )

    async def watch(self) -> None:
        """Returns never; raises `EngineLostError` once the engine process is gone."""
        while not self.llm.errored:  # noqa: ASYNC110 - vLLM offers nothing to await
            await asyncio.sleep(LIVENESS_S)
        raise self._lost()

    def _lost(self) -> EngineLostError:
        for process in self._processes:
            process.join(DEATH_S)
        codes = [process.exitcode for process in self._processes if process.exitcode]
        return EngineLostError(f"the vLLM engine process died{how_it_died(codes[0]) if codes else ''}")

    def shutdown(self, grace_s: float = 1.0) -> None:
        """End the engine process and its workers: by SIGTERM, and by SIGKILL what is left after `grace_s`."""
        with suppress(Exception):  # whatever vLLM finds on the way out, the processes must go
            self.llm.shutdown(timeout=grace_s)
        for process in self._processes:
            process.kill()


def _silence_imports() -> None:
    """vLLM's import reports what a CPU machine lacks anyway, before its own log level holds."""
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")


def how_it_died(code: int) -> str:
    """What an exit code of a process says of its end, in brackets."""
    if code > 0:
        return f" (exit code {code})"
    name = signal.Signals(-code).name
    return f" ({name}{DEATHS.get(name, '')})"


def for_this_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Executor everywhere; on the CPU also KV cache size, block size, scheduler and no compilation."""
    from vllm.platforms import current_platform

    from actors.executors import ManyWorkersExecutor, OneWorkerExecutor

    one = arguments.get("tensor_parallel_size", 1) == 1
    filled = {"distributed_executor_backend": OneWorkerExecutor if one else ManyWorkersExecutor} | arguments
    if current_platform.is_cpu():
        filled.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_MB << 20)
        filled.setdefault("block_size", CPU_BLOCK_TOKENS)
        filled["enforce_eager"] = True  # compiling takes half a minute
        if labels_tokens():
            filled.setdefault("scheduler_cls", KEEPING_SCHEDULER)
    return filled


def _fork_is_safe(config: Any) -> bool:
    """Whether the engine process of this CPU engine may be forked, which spares importing vLLM twice (8 s).

    vLLM forks by default but spawns on the CPU, because its multi-process workers read their OpenMP settings
    at import; a single worker inherits ours. What would remain dangerous in a fork is a lock held by another
    thread, and a pool of OpenMP threads, which does not survive it: here there is neither.
    """
    import torch
    from vllm.platforms import current_platform

    alone = threading.active_count() == 1 and torch.get_num_threads() == 1
    return current_platform.is_cpu() and config.parallel_config.world_size == 1 and alone


def _parameters(samples: int, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=samples,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=sampling.include_stop,
        seed=sampling.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),  # text is needed on the way only to find stop strings
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scoring() -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _version_runs(completion: Any) -> list[VersionRun]:
    return [VersionRun(int(span.version), span.end - span.start) for span in completion.weight_versions]


def _sampled(state: Any) -> int:
    """Tokens sampled so far, of an entry of vLLM's output processor."""
    return state.detokenizer.num_output_tokens()
