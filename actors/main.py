"""The actor process: join a run, start the engine, roll out until told to leave.

Invariant: however the process ends, no engine or verifier process is left, and no lease is lost: they are
finished, handed back, or taken back by the broker.

| what happens | what the actor does | exit code |
|---|---|---|
| broker gone, or not there yet | keeps its work, asks again, says so | - |
| SIGTERM, Ctrl-C, or told to drain | finishes what is in flight within a deadline, hands back the rest | 0 |
| a second signal, or told to stop | leaves at once, engine included | 0 |
| the engine died, or a weight swap failed half-way | hands back its leases; a fresh process goes on | 3 |
| the run was resumed with another recipe | leaves its work; a fresh process samples by that one | 3 |
| vLLM cannot start, but did before in this run | says why in one sentence; a fresh process tries again | 3 |
| the broker shuts it out, vLLM cannot start | says why in one sentence | 4 |
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from actors.actor import Actor
from actors.engine import Engine, EngineLostError, engine_arguments
from actors.weights import EngineDamagedError
from common import stacks
from common.accelerator import require_gpu_build
from common.errors import EXIT_RESTART, RunFailedError, UserError, report
from common.messages import Goodbye, Status, StatusQuery, Welcome
from common.model_files import require_tokenizer, tokenizer_digest
from common.process import leave
from common.recipe import Recipe
from common.recipe.digest import sampling_digest
from common.wire import AsyncClient, BrokerUnreachable, Client, RefusedError, hello

log = logging.getLogger("slipstream.actor")

NOTICE_S = 60.0  # how often an actor that waits for the broker's first answer says so
GOODBYE_S = 1.0
EXIT_S = {"stop": 4.0, "drain": 10.0}  # backstop for whatever hangs on the way out


def run_actor(join: str, *, name: str | None = None, keys: Path | None = None) -> int:
    """Run one actor until it is told to leave.

    Args:
        join: "host:port" of the broker.
        name: of this actor, unique in the run; default host and process number.
        keys: folder of CURVE keys, or None on loopback.

    Returns:
        Exit code: 0 when it left in order, 3 (`EXIT_RESTART`) when a fresh process should take its place.

    Raises:
        UserError: `join` is no address, the model cannot be found here, or torch cannot use this machine's GPU.
        RunFailedError: the broker refuses this actor, or vLLM cannot start and never has under this name.
    """
    stacks.arm()
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    welcome = _introduce(join, name, keys)
    recipe = Recipe.model_validate(welcome.recipe)
    require_gpu_build(recipe.launch.device)
    require_tokenizer(recipe.model.path)
    _use_threads(recipe.actor.threads)
    log.info("starting vLLM on %s", recipe.model.path)
    try:
        engine = Engine(**engine_arguments(recipe, name))
    except RunFailedError as error:
        if not _was_in_the_run(join, name, keys):
            raise
        log.error("%s; it has worked here before: a fresh process tries again", error)
        return EXIT_RESTART
    try:
        return asyncio.run(_live(engine, recipe, join, name, keys))
    except (EngineDamagedError, EngineLostError) as error:
        log.error("%s; a fresh process must take over", error)
        return EXIT_RESTART
    except RefusedError as error:
        if error.code == "changed":
            log.error("%s", error)
            return EXIT_RESTART
        raise RunFailedError(f"the broker refused actor {name}: {error}") from None
    finally:
        engine.shutdown()


def _introduce(join: str, name: str, keys: Path | None) -> Welcome:
    """Get the recipe. As an observer: the broker counts an actor once its engine runs."""
    client = Client(join, hello("observer", f"{name}-starting"), keys=keys)
    try:
        welcome = _patient_welcome(client)
        with suppress(BrokerUnreachable):
            client.request(Goodbye(reason="has the recipe"), timeout_s=GOODBYE_S)
        return welcome
    except RefusedError as error:
        raise RunFailedError(f"the broker refused actor {name}: {error}") from None
    finally:
        client.close()


def _patient_welcome(client: Client) -> Welcome:
    """Wait for the broker however long it takes: its host may be down for hours, and nobody starts us again."""
    while True:
        try:
            return client.connect(NOTICE_S)
        except BrokerUnreachable as error:
            log.warning("%s; still trying", error)


def _was_in_the_run(join: str, name: str, keys: Path | None) -> bool:
    """Whether an actor of this name has been in the run: its engine has started before, with the same settings."""
    client = Client(join, hello("observer", f"{name}-starting"), keys=keys)
    try:
        status = client.request(StatusQuery(), timeout_s=NOTICE_S).message
        return isinstance(status, Status) and name in status.status["peers"]
    except (BrokerUnreachable, RefusedError):
        return False
    finally:
        client.close()


def _use_threads(threads: int | None) -> None:
    """OpenMP threads of the engine on the CPU: the recipe's, the launcher's, or one for each core given."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    chosen = os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    if chosen == "1":  # torch, here already, has read the variable before; a spawned engine reads it anew
        import torch

        torch.set_num_threads(1)


async def _live(engine: Engine, recipe: Recipe, join: str, name: str, keys: Path | None) -> int:
    tokenizer, sampling = tokenizer_digest(engine.tokenizer), sampling_digest(recipe)
    ours = hello("actor", name, run=recipe.run.name, tokenizer=tokenizer, sampling=sampling)
    wire = AsyncClient(join, ours, keys=keys)
    try:
        await engine.warm_up()
        welcome = await wire.connect(None)
        actor = Actor(engine, recipe, wire, name, welcome)
        gc.collect()
        gc.freeze()  # a million objects of the imports, which every full collection would walk through
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


if __name__ == "__main__":  # a worker without the command line, for tests and debuggers
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        code = run_actor(sys.argv[1], name=sys.argv[2] if len(sys.argv) > 2 else None)
    except (UserError, RunFailedError) as error:
        code = report(error)
    leave(code)
