"""Which policy version sampled each token of a response.

Invariant: the spans of a response are contiguous, cover all its tokens, and name the version whose weights
produced the token's logits. vLLM labels tokens itself from 0.29 on (`CompletionOutput.weight_versions`); for
older engines tokens are counted while the engine is paused and its output queue is drained: counting in the
consumer, or without the drain, was seen to be wrong whenever the front end lagged.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

_SETTLE_S = 0.005  # the output handler's last batch, once the queue is empty


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` (inclusive) to `end` (exclusive) of a response were sampled from `version`."""

    version: int
    start: int
    end: int


class TokenVersions:
    """Spans per response, natively or by counting.

    Args:
        engine: an AsyncLLM.
        initial: the version that the engine was started with.
    """

    def __init__(self, engine: Any, initial: int) -> None:
        self._engine = engine
        self.native = labels_tokens()
        self.current = initial
        self._starts: dict[str, list[tuple[int, int]]] = {}  # per request: (version, first token)

    def begin(self, request_id: str) -> None:
        """Call before a request is submitted (n = 1 where the engine does not label tokens itself)."""
        if not self.native:
            self._starts[request_id] = [(self.current, 0)]

    def spans(self, request_id: str, completion: Any) -> list[VersionSpan]:
        """Spans of a finished response (a `CompletionOutput`); the request is forgotten."""
        starts = self._starts.pop(request_id, [(self.current, 0)])
        if self.native and completion.weight_versions:
            return [VersionSpan(int(s.version), s.start, s.end) for s in completion.weight_versions]
        total = len(completion.token_ids)
        ends = [start for _, start in starts[1:]] + [total]
        spans = (VersionSpan(v, start, end) for (v, start), end in zip(starts, ends, strict=True))
        return [span for span in spans if span.end > span.start]

    async def committed(self, version: int) -> None:
        """Call while the engine is paused, right after the commit of `version`."""
        if not self.native:
            await self._drain()
            for state in self._engine.output_processor.request_states.values():
                name = getattr(state, "external_req_id", None) or state.request_id
                if name in self._starts:
                    self._starts[name].append((version, state.detokenizer.num_output_tokens()))
        self.current = version

    async def _drain(self) -> None:
        """Waits until every token that was sampled before the pause has been counted."""
        outputs = self._engine.engine_core.outputs_queue
        while not outputs.empty():  # noqa: ASYNC110 - vLLM's own queue, which offers nothing to await
            await asyncio.sleep(0.001)
        await asyncio.sleep(_SETTLE_S)


def labels_tokens() -> bool:
    """Whether this vLLM records the version of every token. Where there is an engine, vLLM is imported."""
    outputs = sys.modules.get("vllm.outputs")
    return "weight_versions" in getattr(
        getattr(outputs, "CompletionOutput", None), "__dataclass_fields__", {}
    )
