"""Who gets which cores and GPUs of one machine.

Invariant: on CPU every learner rank and every engine has its own cores, never shared with another of them
(two busy cores with three busy threads were seen to run several times slower); on GPUs nobody's memory is
counted twice, except where the recipe shares one GPU on purpose. Pure functions: the machine is an argument.

What else an actor does (front end, verification) needs a part of a core now and then. Where learner and engines
have one thread each, so that no thread waits for another at a barrier, it may run on any of the cores, and the
kernel puts it where something is idle; elsewhere it stays on the engine's cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from common.process import ENGINE_CORES_VARIABLE
from common.recipe import Recipe


@dataclass(frozen=True)
class Share:
    """One process's part of the machine.

    Attributes:
        cores: of its own (None: any).
        threads: OMP threads.
        gpus: indices or UUIDs (empty: none).
        roaming: of an actor: cores on which all but its engine may run (None: `cores`).
    """

    cores: tuple[int, ...] | None
    threads: int
    gpus: tuple[str, ...] = ()
    roaming: tuple[int, ...] | None = None

    def environment(self) -> dict[str, str]:
        """Environment variables that make a process keep to its part."""
        variables = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        variables["CUDA_DEVICE_ORDER"] = (
            "PCI_BUS_ID"  # as NVML counts, which gave the indices; CUDA: fastest first
        )
        if self.roaming is not None and self.cores is not None:
            variables[ENGINE_CORES_VARIABLE] = ",".join(map(str, self.cores))
        return variables


@dataclass(frozen=True)
class Layout:
    """Parts of all processes; `device` is "cpu" or "gpu"."""

    device: str
    broker: Share
    learner: Share
    actors: tuple[Share, ...]


def share_out(recipe: Recipe, cores: list[int], gpus: list[str]) -> Layout:
    """Share out a machine.

    Args:
        recipe: its `launch`, `learner.ranks`, `actor.count` and `actor.tensor_parallel` decide.
        cores: core numbers that may be used.
        gpus: GPU indices or UUIDs that may be used.

    Raises:
        UserError: more is asked for than there is.
    """
    device = recipe.launch.device
    if device == "auto":
        device = "gpu" if gpus else "cpu"
    return _on_gpus(recipe, cores, gpus) if device == "gpu" else _on_cores(recipe, cores)


def _on_gpus(recipe: Recipe, cores: list[int], gpus: list[str]) -> Layout:
    for_learner = recipe.learner.ranks
    for_actors = recipe.actor.count * recipe.actor.tensor_parallel
    if recipe.launch.shared_gpu:
        if not gpus:
            raise UserError("asks for a GPU, and NVML finds none.", setting="launch.shared_gpu")
        if recipe.learner.ranks != 1 or for_actors != 1:
            raise UserError(
                "one shared GPU holds one learner rank and one actor: set learner.ranks = 1, actor.count = 1, "
                "actor.tensor_parallel = 1.",
                setting="launch.shared_gpu",
            )
        share = Share(None, max(1, len(cores) // 2), (gpus[0],))
        return Layout("gpu", Share(None, 1), share, (share,))
    if for_learner + for_actors > len(gpus):
        raise UserError(
            f"the learner needs {for_learner} GPUs and the actors {for_actors} (actor.count x "
            f"actor.tensor_parallel), but this machine offers {len(gpus)}.",
            setting="actor.count",
        )
    threads = max(1, len(cores) // (for_learner + for_actors))
    learner = Share(None, threads, tuple(gpus[:for_learner]))
    rest, width = gpus[for_learner:], recipe.actor.tensor_parallel
    actors = tuple(
        Share(None, threads, tuple(rest[i * width : (i + 1) * width])) for i in range(recipe.actor.count)
    )
    return Layout("gpu", Share(None, 1), learner, actors)


def _on_cores(recipe: Recipe, cores: list[int]) -> Layout:
    ranks, count = recipe.learner.ranks, recipe.actor.count
    per_rank = recipe.launch.learner_cores or max(1, len(cores) // (ranks + count))
    per_actor = recipe.launch.actor_cores or max(1, (len(cores) - per_rank * ranks) // count)
    asked = per_rank * ranks + per_actor * count
    if asked > len(cores):
        if recipe.launch.learner_cores or recipe.launch.actor_cores:
            raise UserError(
                f"{ranks} learner ranks x {per_rank} and {count} actors x {per_actor} cores are {asked}, but "
                f"this machine offers {len(cores)}.",
                setting="launch.actor_cores",
            )
        # More processes than cores: nobody is pinned, the system shares out as well as it can.
        return Layout("cpu", Share(None, 1), Share(None, 1), (Share(None, 1),) * count)
    learner = Share(tuple(cores[: per_rank * ranks]), per_rank)
    rest = cores[per_rank * ranks :]
    threads = recipe.actor.threads or per_actor
    roaming = tuple(cores[:asked]) if per_rank == threads == 1 else None
    actors = tuple(
        Share(tuple(rest[i * per_actor : (i + 1) * per_actor]), threads, roaming=roaming)
        for i in range(count)
    )
    return Layout("cpu", Share(None, 1), learner, actors)
