"""vLLM's classes, for an engine process that never outlives the actor that started it.

Invariant: the engine process dies with its actor however the actor ends (also by SIGKILL), and hears none of
the signals that are meant for the actor: Ctrl-C and a launcher's SIGTERM go to a process group, and an engine
that took them would break off the very responses that a draining actor still wants to finish.

vLLM constructs the executor inside the engine process, which is therefore where both are arranged. Workers of a
tensor-parallel engine end by vLLM's own death pipe when the engine process does.
"""

from __future__ import annotations

import os

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.failure import keep_errors
from common import stacks
from common.process import ENGINE_CORES_VARIABLE, die_with_parent, use_cores

ACTOR_PID_VARIABLE = "SLIPSTREAM_ACTOR_PID"

keep_errors()  # here, because every process of the engine loads this module


def bind_to_actor() -> None:
    """Tie this process to the actor's life, take it out of the actor's process group, let it show its stacks."""
    die_with_parent()
    actor = os.environ.get(ACTOR_PID_VARIABLE)
    if actor is not None and os.getppid() != int(actor):
        os._exit(1)  # the actor died before the tie was made
    os.setpgid(0, 0)
    if cores := os.environ.get(ENGINE_CORES_VARIABLE):
        use_cores(map(int, cores.split(",")))
    stacks.arm()


class OwnedLLM(AsyncLLM):
    """An AsyncLLM that is shut down by its owner, and not by a finaliser that fails in a dying interpreter."""

    def __del__(self) -> None:
        pass


class OneWorkerExecutor(UniProcExecutor):
    """The worker runs inside the engine process."""

    def _init_executor(self) -> None:
        bind_to_actor()
        super()._init_executor()


class ManyWorkersExecutor(MultiprocExecutor):
    """One process per tensor-parallel rank."""

    def _init_executor(self) -> None:
        bind_to_actor()
        super()._init_executor()
