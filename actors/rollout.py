"""Questions in, scored groups out: keeps the engine busy and hands everything over.

Invariant: every leased group ends in exactly one of three ways: published until the broker has answered,
handed back with a reason, or (when the process dies) taken back by the broker. Nothing of a group is kept
after that. Publishing never holds up generation; what is generated but not yet handed over is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from actors.engine import Engine, Sample, Sampling
from actors.meters import Meters
from actors.policy import Policy
from actors.prompts import Prompts
from actors.scoring import Score, Scorer
from common.messages import (
    Ack,
    Assignment,
    Cause,
    EvalJob,
    Grant,
    GroupHeader,
    GroupId,
    Lease,
    Message,
    Publish,
    Release,
    ResponseHeader,
)
from common.wire import AsyncClient, RefusedError, Reply

log = logging.getLogger("slipstream.actor.rollout")

HOLD_S = 2.0  # how long the broker may hold a request for work
LOOK_S = 0.05  # how often free capacity is looked for while the engine is full
RETRY_S = 1.0  # before a refused lease, or a group that the broker cannot take yet, is tried again
RELEASE_S = 2.0
LATER = ("not_now", "full", "internal")  # refusals that pass by themselves


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the rollout.

    Attributes:
        sequences: decoded at one time by the engine.
        sequences_leased: to have in the engine (`Recipe.sequences_leased`).
        group_size: G.
        prompt_tokens: longer prompts are handed back.
        max_staleness: versions that the engine may be behind before it asks for work (I1).
    """

    sequences: int
    sequences_leased: int
    group_size: int
    prompt_tokens: int
    max_staleness: int

    @property
    def groups_kept(self) -> int:
        """Groups that may wait for verification or hand-over before no more are leased."""
        return 4 + 2 * -(-self.sequences // self.group_size)


class WeightState(Protocol):
    """What the rollout reads from the weight receiver."""

    @property
    def cache_salt(self) -> str | None:
        """Salt of the prefix cache, where the KV cache outlives a swap."""

    @property
    def lora(self) -> Any | None:
        """Pushed adapter, or None."""


@dataclass(slots=True)
class Waiting:
    """Whom the actor waits for, and since when (monotonic clock)."""

    whom: str
    since: float


class Rollout:
    """Leases, samples, verifies and publishes groups. `run` it as a task; `drain` ends it.

    Args:
        wire: connection to the broker; said Hello already.
        name: of this actor.
        engine: the vLLM engine.
        prompts, scorer, policy, weights, meters: see their modules.
        sampling: of training responses.
        limits: see `Limits`.
        on_evaluation: called with every `EvalJob` that is granted.
    """

    def __init__(
        self,
        wire: AsyncClient,
        name: str,
        engine: Engine,
        *,
        prompts: Prompts,
        scorer: Scorer,
        policy: Policy,
        weights: WeightState,
        meters: Meters,
        sampling: Sampling,
        limits: Limits,
        on_evaluation: Callable[[EvalJob], None],
    ) -> None:
        self._wire, self._name, self._engine = wire, name, engine
        self._prompts, self._scorer, self._policy, self._weights = prompts, scorer, policy, weights
        self._meters, self._sampling, self._limits = meters, sampling, limits
        self._on_evaluation = on_evaluation
        self._groups: dict[tuple[GroupId, int], asyncio.Task[None]] = {}  # by group and lease
        self._generating = 0
        self._progress = asyncio.Event()
        self._draining = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.newest_version = 0  # that the broker knows of
        self.waiting: Waiting | None = None

    @property
    def leases(self) -> list[GroupId]:
        """Groups in hand."""
        return list(dict.fromkeys(group for group, _ in self._groups))

    @property
    def backlog(self) -> int:
        """Groups that are generated and not yet handed over."""
        return len(self._groups) - self._generating

    # --- leasing -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the engine busy until cancelled or drained.

        Raises:
            EngineLostError: the engine died under a group.
        """
        leasing = asyncio.create_task(self._lease_for_ever(), name="lease")
        try:
            await asyncio.wait({leasing, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            leasing.result()
        finally:
            leasing.cancel()

    async def _lease_for_ever(self) -> None:
        while not self._draining:
            capacity = self._capacity()
            if capacity <= 0:
                await self._until_progress()
                continue
            try:
                grant = await self._ask(capacity)
            except RefusedError as refused:
                if refused.code not in LATER:
                    raise
                self._wait_for("broker", str(refused))
                await asyncio.sleep(RETRY_S)
                continue
            await self._accept(grant)

    def _capacity(self) -> int:
        """Groups that the engine has room for; none while it holds weights that are too old to be trained on."""
        if self.newest_version - self._policy.version > self._limits.max_staleness:
            self._wait_for("weights", f"version {self.newest_version}")
            return 0
        if self.backlog >= self._limits.groups_kept:
            return 0
        free = self._limits.sequences_leased - self._engine.unfinished
        return max(0, free) // self._limits.group_size

    async def _until_progress(self) -> None:
        # A sequence that ends frees a slot before its group is complete, and nothing announces it.
        self._progress.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._progress.wait(), LOOK_S)

    async def _ask(self, capacity: int) -> Grant:
        policy = self._policy
        request = Lease(capacity=capacity, version=policy.version, era=policy.era, wait_s=HOLD_S)
        reply = await self._wire.request(request, timeout_s=None, hold_s=HOLD_S)
        assert isinstance(reply.message, Grant)
        return reply.message

    async def _accept(self, grant: Grant) -> None:
        if self._draining:
            await self.release([a.group for a in grant.groups], "the actor is leaving")
            return
        if grant.groups or self._groups:
            self.waiting = None
        else:
            self._wait_for("broker", grant.reason or "no work")
        for assignment in grant.groups:
            self._start(assignment)
        if grant.evaluation is not None:
            self._on_evaluation(grant.evaluation)
        await asyncio.sleep(0)  # lets the new groups enter the engine before capacity is counted again

    def _wait_for(self, whom: str, why: str) -> None:
        whom = f"{whom}: {why}"[:200]
        if self._groups:
            self.waiting = None
        elif self.waiting is None or self.waiting.whom != whom:
            self.waiting = Waiting(whom, time.monotonic())

    def _start(self, assignment: Assignment) -> None:
        # A group may come back under a new lease while the answer to its old one is still on its way.
        key = (assignment.group, assignment.lease)
        if key in self._groups:
            return  # the reply to a lease that was sent twice
        task = asyncio.create_task(self._answer(assignment), name=f"group {assignment.group}")
        self._groups[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    def _ended(self, key: tuple[GroupId, int], task: asyncio.Task[None]) -> None:
        self._groups.pop(key, None)
        self._progress.set()
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    # --- one group -----------------------------------------------------------------------------------------

    async def _answer(self, assignment: Assignment) -> None:
        """Generate, verify and publish one group."""
        prompt = self._prompts.encode(assignment.question["problem"])
        room = min(self._limits.prompt_tokens, self._engine.max_context - 1)
        if not 0 < len(prompt) <= room:
            reason = f"the prompt has {len(prompt)} tokens; 1 to {room} are possible"
            await self.release([assignment.group], reason, "unanswerable")
            return
        era, started = self._policy.era, time.monotonic()
        samples = await self._generate(prompt, assignment.samples)
        generated = time.monotonic()
        self._meters.generated(samples, generated - started)
        scores = await self._scorer.score(assignment.question, samples)
        verified = time.monotonic()
        self._meters.scored(scores, verified - generated)
        header = _header(assignment, samples, scores, prompt_tokens=len(prompt), era=era, actor=self._name)
        header = msgspec.structs.replace(
            header, generate_s=generated - started, verify_s=verified - generated
        )
        await self._publish(Publish(header=header), _payload(prompt, samples))

    async def _generate(self, prompt: list[int], count: int) -> list[Sample]:
        self._generating += 1
        try:
            return await self._engine.generate(
                prompt, count, self._sampling, cache_salt=self._weights.cache_salt, lora=self._weights.lora
            )
        finally:
            self._generating -= 1
            self._progress.set()

    async def _publish(self, message: Publish, payload: list[bytes]) -> None:
        """Send a group until the broker has answered, however long that takes."""
        try:
            reply = await deliver(self._wire, message, payload)
        except RefusedError as refused:
            log.warning("group %s was refused (%s): %s", message.header.group, refused.code, refused)
            self._meters.published("refused")
            return
        assert isinstance(reply.message, Ack)
        self._meters.published(reply.message.status)

    # --- leaving -------------------------------------------------------------------------------------------

    def stop_leasing(self) -> None:
        """Ask for no more work; what is in hand goes on."""
        self._draining = True
        self._progress.set()

    async def drain(self, deadline_s: float, reason: str) -> None:
        """Finish what is in hand within `deadline_s`, hand back the rest.

        Raises:
            EngineLostError: the engine died meanwhile; what was in hand has been handed back.
        """
        self.stop_leasing()
        if self._groups:
            await asyncio.wait(list(self._groups.values()), timeout=deadline_s)
            await self._abandon(reason)
        if self._failed.done():
            self._failed.result()

    async def _abandon(self, reason: str) -> None:
        left = self.leases
        for task in list(self._groups.values()):
            task.cancel()
        await asyncio.sleep(0)
        await self.release(left, reason)

    async def release(self, groups: Sequence[GroupId], reason: str, cause: Cause = "leaving") -> None:
        """Hand leases back (`cause` as in `Release`); a broker that does not answer takes them back by itself."""
        if not groups:
            return
        with suppress(Exception):
            message = Release(groups=list(groups), reason=reason, cause=cause)
            await self._wire.request(message, timeout_s=RELEASE_S)
        self._meters.counts["groups_released"] += len(groups)


async def deliver(wire: AsyncClient, message: Message, payload: Sequence[bytes] = ()) -> Reply:
    """Send what was worked out until the broker has taken it, however long that takes; returns its answer.

    Raises:
        RefusedError: the broker refuses it for good.
    """
    while True:
        try:
            return await wire.request(message, payload, timeout_s=None)
        except RefusedError as refused:
            if refused.code not in LATER:
                raise
        await asyncio.sleep(RETRY_S)


def _header(
    assignment: Assignment,
    samples: Sequence[Sample],
    scores: Sequence[Score],
    *,
    prompt_tokens: int,
    era: int,
    actor: str,
) -> GroupHeader:
    """The header of a scored group. `era` is that of its start: the broker then also refuses what began before a rewind."""
    responses = [
        ResponseHeader(
            tokens=len(sample.tokens),
            reward=score.reward,
            verdict=score.verdict,
            finish=sample.finish,
            versions=sample.versions,
        )
        for sample, score in zip(samples, scores, strict=True)
    ]
    return GroupHeader(
        group=assignment.group,
        lease=assignment.lease,
        era=era,
        actor=actor,
        prompt_tokens=prompt_tokens,
        responses=responses,
    )


def _payload(prompt: Sequence[int], samples: Sequence[Sample]) -> list[bytes]:
    """Prompt ids int32 [P], response ids int32 [sum T], log-probabilities float32 [sum T]."""
    return [
        np.asarray(prompt, dtype=np.int32).tobytes(),
        np.concatenate([sample.tokens for sample in samples]).tobytes(),
        np.concatenate([sample.logprobs for sample in samples]).tobytes(),
    ]
