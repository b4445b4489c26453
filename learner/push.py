"""The learner's side of the weight push: the one module here that knows `common.weights`.

Invariant: pushing costs the training loop one copy of the weights (a snapshot, gathered by all ranks) and no
wait for any actor; sending overlaps the next step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.messages import WeightsAddress
from common.recipe.schema import Recipe
from common.weights import Publisher, Snapshot
from common.weights.probe import Probe
from learner.engine import Engine
from learner.model import DTYPES
from learner.ranks import Ranks
from learner.snapshot import take_snapshot

MIB = 1 << 20
WEIGHTS_FOLDER = "weights"


def route_of(recipe: Recipe, *, on_gpu: bool) -> str:
    """The route of a recipe for a learner on GPUs or not; `auto` is nccl on GPU, ipc on one shared GPU, gloo on CPU.

    Under tensor parallelism an NCCL receive would run beside the engine's own collectives: gloo there.
    """
    if recipe.weights.route != "auto":
        return recipe.weights.route
    if not on_gpu or recipe.actor.tensor_parallel > 1:
        return "gloo"
    return "ipc" if recipe.launch.shared_gpu else "nccl"


class WeightPush:
    """Publishes versions of the policy; created and used by all ranks alike, served by rank 0.

    Args:
        run: name of the run; receivers of another run are turned away.
        folder: run folder, for the `disk` route.

    Raises:
        UserError: a setting of `weights` is wrong or its address cannot be bound.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, run: str, folder: Path) -> None:
        self._recipe, self._ranks = recipe, ranks
        route = route_of(recipe, on_gpu=ranks.device.type == "cuda")
        on_device = route in ("nccl", "ipc")
        device = ranks.device if on_device else "cpu"
        self._pinned = route == "nccl" and recipe.weights.snapshots == "host"
        self._kept_on = "cpu" if self._pinned else device
        self._publisher: Publisher | None = None
        self._absent: set[str] = set()
        if ranks.leads:
            self._publisher = Publisher(
                recipe.weights.bind,
                recipe.weights.port,
                run_id=run,
                route=route,
                device=device,
                deadline_s=recipe.weights.deadline_s,
                degree=recipe.weights.degree,
                checksum_every=recipe.weights.checksum_every,
                folder=folder / WEIGHTS_FOLDER if route == "disk" else None,
            )

    def address(self, era: int) -> WeightsAddress:
        """Where rank 0 serves the weights of an era."""
        assert self._publisher is not None
        address = self._publisher.address
        return WeightsAddress(address=address, token=address.rsplit("/", 1)[-1], era=era)

    def whole_model(self, engine: Engine) -> Snapshot | None:
        """A copy of the policy in host memory, adapters merged; collective, None on all ranks but 0."""
        return take_snapshot(engine.deepspeed, dtype=DTYPES[self._recipe.model.dtype])

    def publish(self, engine: Engine, version: int, probe: Probe | None = None) -> None:
        """Offer the policy as it is now as `version`, with a probe of it; collective.

        Raises:
            RunFailedError: an actor holds weights that differ from what was sent.
        """
        lora = self._recipe.lora
        if self._publisher is not None:
            self._publisher.make_room()
        snapshot = take_snapshot(
            engine.deepspeed,
            dtype=DTYPES[self._recipe.model.dtype],
            bucket_bytes=self._recipe.weights.bucket_mb * MIB,
            device=self._kept_on,
            pinned=self._pinned,
            adapters_only=lora is not None and lora.push == "adapter",
        )
        if self._publisher is not None and snapshot is not None:
            self._publisher.publish(version, snapshot, probe)

    def keep_actors(self, living: set[str]) -> None:
        """Forget actors that are not in the run any more; `living` is what the broker says at each heartbeat.

        Only those missing twice in a row: an actor may have joined after the broker's reply was written.
        """
        if self._publisher is None:
            return
        absent = self._publisher.actors() - living
        for name in absent & self._absent:
            self._publisher.drop_actor(name, "the broker says that it is gone")
        self._absent = absent

    def meters(self) -> dict[str, float]:
        """Meters of the push, flattened: `push_NAME`, or the worst actor for those kept per actor."""
        if self._publisher is None:
            return {}
        return {f"push_{name}": value for name, value in _flat(self._publisher.meters()) if value is not None}

    def close(self) -> None:
        """Stop serving."""
        if self._publisher is not None:
            self._publisher.close()


def _flat(meters: dict[str, Any]) -> list[tuple[str, float | None]]:
    flat: list[tuple[str, float | None]] = []
    for name, value in meters.items():
        if name == "failures":
            flat.append((name, float(sum(value.values()))))
        elif isinstance(value, dict):
            numbers = [float(entry) for entry in value.values() if entry is not None]
            flat.append((name, max(numbers, default=None)))
        elif value is not None:
            flat.append((name, float(value)))
    return flat
