"""vLLM's scheduler, for responses that nobody reads before they are finished.

vLLM hands every sampled token over to the front end at once: a message per step with an object per sequence,
packed, sent, unpacked and filed, although a rollout wants whole responses. This scheduler keeps the tokens of
such responses and hands them over every few steps, with the finished response, or when generation is paused.

Invariants: the front end receives the same tokens and log-probabilities in the same order. A message never
holds tokens of two weight versions: versions change only while generation is paused, and a pause is complete
(for vLLM, too) only once everything that was kept has been handed over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists

STRIDE = 16  # steps between two messages: how late meters of running responses may be


class Kept:
    """Tokens of one response that the front end does not know of yet."""

    __slots__ = ("client", "first", "logprobs", "tokens")

    def __init__(self, client: int, first: EngineCoreOutput) -> None:
        self.client, self.first = client, first
        self.tokens: list[int] = []
        self.logprobs: list[LogprobsLists] = []

    def add(self, output: EngineCoreOutput) -> None:
        """The tokens of one step."""
        self.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            self.logprobs.append(output.new_logprobs)

    def message(self, last: EngineCoreOutput | None = None) -> EngineCoreOutput:
        """All tokens as one output; `last` says how the response ended."""
        whole = last or self.first
        whole.new_token_ids = self.tokens
        whole.new_logprobs = _joined(self.logprobs)
        whole.prefill_stats = self.first.prefill_stats
        return whole


class KeepingScheduler(Scheduler):
    """Keeps the tokens of responses that are wanted whole and without text; others pass as they come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._whole: set[str] = set()  # requests whose tokens are kept
        self._kept: dict[str, Kept] = {}
        self._steps = 0

    def add_request(self, request: Any) -> None:
        """Adds a request; see `Scheduler`."""
        if _wanted_whole(request.sampling_params):
            self._whole.add(request.request_id)
        super().add_request(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Ends requests from outside (aborts): nobody waits for what was kept of them."""
        finished = super().finish_requests(request_ids, finished_status)
        for name in [name for name in self._whole if name not in self.requests]:
            self._forget(name)
        return finished

    def has_requests(self) -> bool:
        """Whether the engine should be stepped: a pause waits for what was kept."""
        return super().has_requests() or (self._paused and bool(self._kept))

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Outputs of a step for each client, less what is kept."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, message in outputs.items():
            kept = (self._keep(client, output) for output in message.outputs)
            message.outputs = [output for output in kept if output is not None]
        self._steps += 1
        if self._paused or self._steps % STRIDE == 0:
            self._hand_over(outputs)
        return {client: message for client, message in outputs.items() if not _is_empty(message)}

    @property
    def _paused(self) -> bool:
        return self.pause_state is PauseState.PAUSED_ALL

    def _keep(self, client: int, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """The output to pass on: the given one, the whole response at its end, or none yet."""
        name = output.request_id
        if name not in self._whole:
            return output
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = Kept(client, output)
        kept.add(output)
        if not output.finished:
            return None
        self._forget(name)
        return kept.message(output)

    def _hand_over(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for kept in self._kept.values():
            outputs.setdefault(kept.client, EngineCoreOutputs()).outputs.append(kept.message())
        self._kept.clear()

    def _forget(self, name: str) -> None:
        self._whole.discard(name)
        self._kept.pop(name, None)


def _wanted_whole(sampling: Any) -> bool:
    """Only the finished response is asked for, and no text on the way: stop strings are looked for in text."""
    return (
        sampling is not None
        and sampling.output_kind is RequestOutputKind.FINAL_ONLY
        and not sampling.detokenize
        and sampling.prompt_logprobs is None
    )


def _joined(parts: list[LogprobsLists]) -> LogprobsLists | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return LogprobsLists(
        np.concatenate([part.logprob_token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.sampled_token_ranks for part in parts]),
    )


def _is_empty(message: EngineCoreOutputs) -> bool:
    return not (message.outputs or message.scheduler_stats or message.finished_requests)
