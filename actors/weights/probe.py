"""The engine's half of a probe: compares the running engine with the learner after each push (I6).

Invariant: only log-probabilities of one and the same version are compared; an engine that differs from the learner by
more than the recipe allows ends its actor, which publishes no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from statistics import fmean
from typing import Protocol

import numpy as np

from common.errors import RunFailedError, SlipstreamError
from common.weights.probe import Probe

log = logging.getLogger("slipstream.actor.weights")


class Scorer(Protocol):
    """What scores tokens: the actor's engine with the weights that it holds."""

    async def __call__(self, tokens: list[int]) -> np.ndarray:
        """[n - 1] float32, log π of each token but the first, temperature 1."""


class MismatchProbe:
    """Scores the probe of every push beside the rollouts; `watch` ends when the engine fails one.

    Args:
        score: see `Scorer`.
        version: of the engine, now.
        limit: mean |difference| in nats per token that is allowed (`learner.max_mismatch`).
    """

    def __init__(self, score: Scorer, version: Callable[[], int], limit: float) -> None:
        self._score, self._version, self._limit = score, version, limit
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._meters: dict[str, float] = {}

    def meters(self) -> dict[str, float]:
        """Of the newest probe that was scored: mean and largest |difference| in nats; how many were."""
        return dict(self._meters)

    def start(self, probe: Probe, version: int) -> None:
        """Score `probe`, which is of `version`; one at a time, the newest counts."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._compare(probe, version), name=f"probe of version {version}")

    async def watch(self) -> None:
        """Returns never.

        Raises:
            RunFailedError: engine and learner disagree.
        """
        await self._failed

    async def _compare(self, probe: Probe, version: int) -> None:
        try:
            logprobs = await self._score(list(probe.tokens))
        except SlipstreamError as error:  # who watches the engine says what happened to it
            log.debug("the probe of version %d was not scored: %s", version, error)
            return
        if self._version() != version:
            return
        found = probe.differences(logprobs.tolist())
        mean, count = fmean(found), self._meters.get("probes", 0.0) + 1.0
        self._meters = {"probe_mean": mean, "probe_max": max(found), "probes": count}
        if not mean <= self._limit and not self._failed.done():
            self._failed.set_exception(self._disagreement(version, mean))

    def _disagreement(self, version: int, mean: float) -> RunFailedError:
        return RunFailedError(
            f"this engine and the learner disagree by {mean:.3g} nats per token on the probe of version {version}, more "
            f"than learner.max_mismatch = {self._limit:g}: what it records is not what the policy would sample"
        )
