"""All that runs beside the engine: rollout, weights, heartbeats, evaluation, and the end of it.

Invariant: the parts run until an order to leave has been carried out or one of them fails; then all of them end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import numpy as np

from actors.engine import Engine, EngineLostError, Sampling
from actors.evaluation import Evaluator
from actors.heart import Heart
from actors.leaving import Leaving, Order, Way
from actors.meters import Meters
from actors.policy import Policy
from actors.prompts import Prompts
from actors.rollout import Limits, Rollout, deliver
from actors.scoring import Scorer
from actors.weights import WeightReceiver
from actors.weights.probe import MismatchProbe
from common.messages import EvalJob, Heartbeat, Pulse, Release, WeightsAddress, Welcome
from common.recipe import Recipe
from common.tasks.templates import get_template
from common.telemetry import Telemetry
from common.verifier import VerifierPool
from common.weights.probe import Probe
from common.wire import AsyncClient, BrokerUnreachable, RefusedError

log = logging.getLogger("slipstream.actor")

PARTS_END_S = 2.0


class Actor:
    """All that runs beside the engine.

    Args:
        engine: started and warm.
        recipe: of the run.
        wire: connection to the broker, which has welcomed us.
        name: of this actor.
        welcome: the broker's.
    """

    def __init__(
        self, engine: Engine, recipe: Recipe, wire: AsyncClient, name: str, welcome: Welcome
    ) -> None:
        template = get_template(
            recipe.data.template,
            model=recipe.model.path,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        self._engine, self._recipe = engine, recipe
        self._policy, self._meters, self._telemetry = Policy(), Meters(), Telemetry()
        self._grader = VerifierPool.from_recipe(recipe, template)
        self._scorer = Scorer(self._grader)
        self._weights = _receiver(engine, recipe, name, self._committed, self._probed)
        self._probe = MismatchProbe(self._score, lambda: self._weights.version, recipe.max_mismatch)
        prompts = Prompts(engine.tokenizer, template)
        self._evaluator = Evaluator(engine, prompts, self._scorer, self._policy, self._weights)
        self._rollout = Rollout(
            wire,
            name,
            engine,
            prompts=prompts,
            scorer=self._scorer,
            policy=self._policy,
            weights=self._weights,
            meters=self._meters,
            sampling=Sampling(
                recipe.rollout.temperature,
                recipe.rollout.max_tokens,
                tuple(template.stop),
                template.include_stop,
            ),
            limits=_limits(recipe),
            on_evaluation=self._evaluate,
        )
        self._wire, self._welcome = wire, welcome
        self._heart = Heart(
            wire,
            welcome.heartbeat_s,
            self._describe,
            self._on_pulse,
            self._mark,
            recipe.broker.no_progress_s,
        )
        self._weights_now: WeightsAddress | None = None
        self._evaluation: asyncio.Task[None] | None = None
        self._leaving = Leaving()

    def _probed(self, probe: Probe, version: int) -> None:
        self._probe.start(probe, version)

    async def _score(self, tokens: list[int]) -> np.ndarray:
        return await self._engine.score(tokens, cache_salt=self._weights.cache_salt, lora=self._weights.lora)

    def _committed(self, version: int) -> None:
        self._policy.committed(version, self._weights.origin or "")
        self._heart.soon()  # a lease request that waits at the broker becomes one of the new version

    async def live(self) -> Way:
        """Roll out until told to leave; returns the way it left: "drain" or "stop"."""
        self._leaving.hear_signals()
        await self._scorer.warm_up()
        await self._follow(self._welcome.weights)
        jobs = (self._weights.run, self._heart.beat, self._engine.watch, self._rollout.run, self._probe.watch)
        tasks = [asyncio.create_task(job()) for job in jobs]
        try:
            return await self._unless_failed(tasks, self._leaving.ordered(self._drain))
        finally:
            parts = [*tasks, *([self._evaluation] if self._evaluation else [])]
            for task in parts:
                task.cancel()
            await asyncio.wait(parts, timeout=PARTS_END_S)  # links are closed while the engine still answers
            self._grader.close()
            if self._leaving.way == "stop":
                self._engine.shutdown(0.0)

    async def _unless_failed(self, tasks: list[asyncio.Task[Any]], leave: Coroutine[Any, Any, Way]) -> Way:
        """The outcome of `leave`, or the first error of `tasks`."""
        leaving = asyncio.create_task(leave)
        watched = {leaving, *tasks}
        while not leaving.done():
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {leaving}:
                watched.discard(task)
                try:
                    task.result()
                except BaseException:
                    leaving.cancel()
                    raise
        return leaving.result()

    async def _drain(self, order: Order) -> None:
        started = time.monotonic()
        await self._rollout.drain(order.deadline_s, f"the actor is leaving ({order.reason})")
        if self._evaluation is not None:
            left = order.deadline_s - (time.monotonic() - started)
            await asyncio.wait({self._evaluation}, timeout=max(0.0, left))

    # --- evaluation ----------------------------------------------------------------------------------------

    def _evaluate(self, job: EvalJob) -> None:
        if self._evaluation is not None and not self._evaluation.done():
            return  # the broker gives an actor one at a time; this is a reply that was sent twice
        self._evaluation = asyncio.create_task(self._answer(job), name=f"evaluation {job.job}")

    async def _answer(self, job: EvalJob) -> None:
        try:
            await deliver(self._wire, await self._evaluator.answer(job))
        except EngineLostError:
            log.warning("evaluation %d was broken off by the engine", job.job)
        except RefusedError as refused:
            log.warning("the answers to evaluation %d were refused: %s", job.job, refused)
            await self._give_back(job, f"its answers were refused: {refused}")
        except Exception as error:  # training does not end for an evaluation; another actor may do better
            log.exception("evaluation %d failed", job.job)
            await self._give_back(job, f"{type(error).__name__}: {error}")

    async def _give_back(self, job: EvalJob, reason: str) -> None:
        with suppress(BrokerUnreachable, RefusedError):  # then the broker takes it back in time
            await self._wire.request(Release(groups=[], reason=reason[:1000], evaluation=job.job))

    # --- heartbeats ----------------------------------------------------------------------------------------

    def _describe(self) -> Heartbeat:
        waiting = self._rollout.waiting
        state = "draining" if self._leaving.way else "waiting" if waiting else "generating"
        return Heartbeat(
            state=state,
            waiting_for=waiting.whom if waiting else None,
            waiting_s=time.monotonic() - waiting.since if waiting else 0.0,
            version=self._policy.version,
            era=self._policy.era,
            leases=self._rollout.leases,
            telemetry=self._measure(),
            time=time.time(),
        )

    def _mark(self) -> tuple[int, ...]:
        """How far the engine has got; see `Heart`."""
        made = self._meters.counts["generated_tokens"]
        return made, self._engine.running_tokens, self._evaluator.answered

    def _measure(self) -> dict[str, float]:
        weights = dict(self._weights.meters())
        failures = {f"failures_{cause}": count for cause, count in weights.pop("failures").items()}
        numbers = {f"weights_{n}": float(v) for n, v in (weights | failures).items() if v is not None}
        return {
            **self._telemetry.sample(),
            **self._meters.report(),
            **numbers,
            **{f"weights_{name}": value for name, value in self._probe.meters().items()},
            "sequences": float(self._engine.unfinished),
            "kv_use": self._engine.kv_use,
            "groups_in_hand": float(len(self._rollout.leases)),
            "verifier_queue": float(self._scorer.waiting),
            "backlog": float(self._rollout.backlog),
        }

    async def _on_pulse(self, pulse: Pulse) -> None:
        self._rollout.newest_version = pulse.version
        await self._follow(pulse.weights)
        if pulse.command == "stop":
            self._leaving.stop(pulse.reason or "the run ends")
        elif pulse.command == "drain":
            self._leaving.drain(self._recipe.broker.lease_s, pulse.reason or "told to drain")

    async def _follow(self, weights: WeightsAddress | None) -> None:
        if weights == self._weights_now:
            return
        self._weights_now = weights
        if weights is not None:
            self._policy.announce(weights)
        await self._weights.set_address(weights.address if weights else None)


def _limits(recipe: Recipe) -> Limits:
    return Limits(
        sequences=recipe.actor.max_sequences,
        sequences_leased=recipe.sequences_leased,
        group_size=recipe.rollout.group_size,
        prompt_tokens=recipe.data.max_prompt_tokens,
        max_staleness=recipe.batch.max_staleness,
    )


def _receiver(
    engine: Engine,
    recipe: Recipe,
    name: str,
    on_commit: Callable[[int], None],
    on_probe: Callable[[Probe, int], None],
) -> WeightReceiver:
    return WeightReceiver(
        engine.llm,
        actor_id=name,
        run_id=recipe.run.name or "run",
        on_commit=on_commit,
        on_probe=on_probe,
        clear_cache=recipe.actor.clear_cache,
        deadline_s=recipe.weights.deadline_s,
    )
