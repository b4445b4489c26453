"""The actor process: join a run, start the engine, roll out until told to leave.

Invariant: however the process ends, no engine or verifier process is left, and no lease is lost: they are
finished, handed back, or taken back by the broker.

| what happens | what the actor does | exit code |
|---|---|---|
| broker gone | keeps its work, asks again, says so | - |
| SIGTERM, Ctrl-C, or told to drain | finishes what is in flight within a deadline, hands back the rest | 0 |
| a second signal, or told to stop | leaves at once, engine included | 0 |
| the engine died, or a weight swap failed half-way | hands back its leases; a fresh process goes on | 3 |
| the broker shuts it out, vLLM cannot start | says why in one sentence | 4 |
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from actors.engine import Engine, EngineLostError, Sampling, engine_arguments
from actors.evaluation import Evaluator
from actors.heart import Heart
from actors.meters import Meters
from actors.policy import Policy
from actors.prompts import Prompts, tokenizer_digest
from actors.rollout import Limits, Rollout
from actors.scoring import Scorer
from actors.weights import EngineDamagedError, WeightReceiver
from common.errors import EXIT_RESTART, RunFailedError, UserError
from common.messages import EvalJob, Goodbye, Heartbeat, Hello, Pulse, WeightsAddress, Welcome
from common.model_files import require_tokenizer
from common.recipe import Recipe
from common.tasks.templates import get_template
from common.telemetry import Telemetry
from common.verifier import VerifierPool
from common.wire import AsyncClient, BrokerUnreachable, Client, RefusedError

log = logging.getLogger("slipstream.actor")

JOIN_S = 300.0  # how long the first answer of the broker is waited for
DRAIN_S = 20.0  # after a signal: below the 30 s that Slurm grants before it kills
GOODBYE_S = 1.0
EXIT_S = {"stop": 4.0, "drain": 10.0}  # backstop for whatever hangs on the way out
Way = str  # "drain" or "stop"


def run_actor(join: str, *, name: str | None = None, keys: Path | None = None) -> int:
    """Run one actor until it is told to leave.

    Args:
        join: "host:port" of the broker.
        name: of this actor, unique in the run; default host and process number.
        keys: folder of CURVE keys, or None on loopback.

    Returns:
        Exit code: 0 when it left in order, 3 (`EXIT_RESTART`) when a fresh process should take its place.

    Raises:
        UserError: no broker answers at `join`, or the model cannot be found here.
        RunFailedError: the broker refuses this actor, or vLLM cannot start.
    """
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    welcome = _introduce(join, name, keys)
    recipe = Recipe.model_validate(welcome.recipe)
    require_tokenizer(recipe.model.path)
    _use_threads(recipe.actor.threads)
    log.info("starting vLLM on %s", recipe.model.path)
    engine = Engine(**engine_arguments(recipe, name))
    try:
        return asyncio.run(_live(engine, recipe, join, name, keys))
    except (EngineDamagedError, EngineLostError) as error:
        log.error("%s; a fresh process must take over", error)
        return EXIT_RESTART
    except RefusedError as error:
        raise RunFailedError(f"the broker refused actor {name}: {error}") from None
    finally:
        engine.shutdown()


def _hello(role: Any, name: str, **more: Any) -> Hello:
    try:
        software = version("slipstream-rl")
    except PackageNotFoundError:
        software = "0"
    return Hello(role=role, peer=name, software=software, host=socket.gethostname(), pid=os.getpid(), **more)


def _introduce(join: str, name: str, keys: Path | None) -> Welcome:
    """Get the recipe. As an observer: the broker counts an actor once its engine runs."""
    client = Client(join, _hello("observer", f"{name}-starting"), keys=keys)
    try:
        welcome = client.connect(JOIN_S)
        client.request(Goodbye(reason="has the recipe"), timeout_s=GOODBYE_S)
        return welcome
    except BrokerUnreachable as error:
        raise UserError(str(error), setting="--join") from None
    except RefusedError as error:
        raise RunFailedError(f"the broker refused actor {name}: {error}") from None
    finally:
        client.close()


def _use_threads(threads: int | None) -> None:
    """OpenMP threads of the engine on the CPU; must be set before torch is imported."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


async def _live(engine: Engine, recipe: Recipe, join: str, name: str, keys: Path | None) -> int:
    hello = _hello("actor", name, run=recipe.run.name, tokenizer=tokenizer_digest(engine.tokenizer))
    wire = AsyncClient(join, hello, keys=keys)
    try:
        await engine.warm_up()
        welcome = await wire.connect(None)
        actor = Actor(engine, recipe, wire, name, welcome)
        way = await actor.live()
        _exit_within(EXIT_S[way])
        return 0
    finally:
        with suppress(BrokerUnreachable, RefusedError):
            await wire.request(Goodbye(reason="leaving"), timeout_s=GOODBYE_S)
        wire.close()


def _exit_within(seconds: float) -> None:
    """Whatever hangs on the way out (a thread in a dead connection), the process is gone after `seconds`."""
    backstop = threading.Timer(seconds, os._exit, args=(0,))
    backstop.daemon = True
    backstop.start()


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
        template = get_template(recipe.data.template, model=recipe.model.path)
        self._engine, self._recipe = engine, recipe
        self._policy, self._meters, self._telemetry = Policy(), Meters(), Telemetry()
        self._grader = VerifierPool.from_recipe(recipe, template)
        self._scorer = Scorer(self._grader)
        self._weights = _receiver(engine, recipe, name, self._committed)
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
        self._heart = Heart(wire, welcome.heartbeat_s, self._describe, self._on_pulse)
        self._weights_now: WeightsAddress | None = None
        self._evaluation: asyncio.Task[None] | None = None
        self._orders: asyncio.Queue[tuple[Way, float, str]] = asyncio.Queue()
        self._way: Way | None = None

    def _committed(self, version: int) -> None:
        self._policy.committed(version, self._weights.origin or "")

    async def live(self) -> Way:
        """Roll out until told to leave; returns the way it left: "drain" or "stop"."""
        self._hear_signals()
        await self._scorer.warm_up()
        await self._follow(self._welcome.weights)
        jobs = [self._weights.run(), self._heart.beat(), self._engine.watch(), self._rollout.run()]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            return await self._unless_failed(tasks, self._leave())
        finally:
            for task in [*tasks, *([self._evaluation] if self._evaluation else [])]:
                task.cancel()
            self._grader.close()
            if self._way == "stop":
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

    # --- leaving -------------------------------------------------------------------------------------------

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)

    def _on_signal(self, name: str) -> None:
        if self._way is None:
            self._order("drain", DRAIN_S, name)
        else:
            self._order("stop", 0.0, f"{name} again")

    def _order(self, way: Way, deadline_s: float, reason: str) -> None:
        if self._way == way or self._way == "stop":
            return
        self._way = way
        log.info("%s: %s", way, reason)
        self._orders.put_nowait((way, deadline_s, reason))

    async def _leave(self) -> Way:
        """Wait for the order to leave and carry it out; an order to stop overtakes a drain."""
        way, deadline_s, reason = await self._orders.get()
        if way == "stop":
            return "stop"
        draining = asyncio.create_task(self._drain(deadline_s, reason))
        overtaken = asyncio.create_task(self._orders.get())
        try:
            await asyncio.wait({draining, overtaken}, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                return "stop"
            draining.result()
            return "drain"
        finally:
            draining.cancel()
            overtaken.cancel()

    async def _drain(self, deadline_s: float, reason: str) -> None:
        started = time.monotonic()
        await self._rollout.drain(deadline_s, f"the actor is leaving ({reason})")
        if self._evaluation is not None:
            left = deadline_s - (time.monotonic() - started)
            await asyncio.wait({self._evaluation}, timeout=max(0.0, left))

    # --- evaluation ----------------------------------------------------------------------------------------

    def _evaluate(self, job: EvalJob) -> None:
        if self._evaluation is not None and not self._evaluation.done():
            return  # the broker gives an actor one at a time; this is a reply that was sent twice
        self._evaluation = asyncio.create_task(self._answer(job), name=f"evaluation {job.job}")

    async def _answer(self, job: EvalJob) -> None:
        try:
            result = await self._evaluator.answer(job)
            await self._wire.request(result, timeout_s=None)
        except EngineLostError:
            log.warning("evaluation %d was broken off by the engine", job.job)
        except RefusedError as refused:
            log.warning("the answers to evaluation %d were refused: %s", job.job, refused)

    # --- heartbeats ----------------------------------------------------------------------------------------

    def _describe(self) -> Heartbeat:
        waiting = self._rollout.waiting
        state = "draining" if self._way else "waiting" if waiting else "generating"
        return Heartbeat(
            state=state,
            waiting_for=waiting.whom if waiting else None,
            waiting_s=time.monotonic() - waiting.since if waiting else 0.0,
            version=self._policy.version,
            era=self._policy.era,
            leases=self._rollout.leases,
            telemetry=self._measure(),
        )

    def _measure(self) -> dict[str, float]:
        weights = {f"weights_{name}": value for name, value in self._weights.meters().items()}
        numbers = {name: float(v) for name, v in weights.items() if isinstance(v, int | float)}
        return {
            **self._telemetry.sample(),
            **self._meters.report(),
            **numbers,
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
            self._order("stop", 0.0, pulse.reason or "the run ends")
        elif pulse.command == "drain":
            self._order("drain", self._recipe.broker.lease_s, pulse.reason or "told to drain")

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
        group_size=recipe.rollout.group_size,
        prompt_tokens=recipe.data.max_prompt_tokens,
        max_staleness=recipe.batch.max_staleness,
    )


def _receiver(engine: Engine, recipe: Recipe, name: str, on_commit: Any) -> WeightReceiver:
    return WeightReceiver(
        engine.llm,
        actor_id=name,
        run_id=recipe.run.name or "run",
        on_commit=on_commit,
        clear_cache=recipe.actor.clear_cache,
        deadline_s=recipe.weights.deadline_s,
    )


if __name__ == "__main__":  # a worker without the command line, for tests and debuggers
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    sys.exit(run_actor(sys.argv[1], name=sys.argv[2] if len(sys.argv) > 2 else None))
