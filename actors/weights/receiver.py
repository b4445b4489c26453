"""Follows the learner on behalf of one engine: offers in, staged versions committed, links renewed for ever.

Invariant: generation is stopped only between `pause_generation` and `resume_generation` around a commit of a
complete copy; no request is aborted; whatever else fails costs one link, which is opened anew under another
name. If a commit fails, the engine's weights are undefined: `run` raises `EngineDamagedError` with the engine
still paused, and the engine must be restarted.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from actors.weights.adapters import adapter_request, neutral_layer
from actors.weights.expected import expected_manifest
from actors.weights.gate import CommitGate
from actors.weights.versions import TokenVersions
from common.errors import SlipstreamError
from common.weights.client import LinkClient
from common.weights.errors import Cause, LinkError
from common.weights.layout import Manifest
from common.weights.probe import Probe
from common.weights.protocol import LinkSpec, Offer, commit_deadline, new_link_name
from common.weights.store import Address

LOGGER = logging.getLogger("slipstream.actor.weights")
T = TypeVar("T")

RETRY_S = (0.2, 5.0)  # first and longest pause before a new link
CommitCallback = Callable[[int], Awaitable[None] | None]
ProbeCallback = Callable[[Probe, int], None]


class EngineDamagedError(SlipstreamError):
    """A commit failed half-way: the engine's weights are undefined and it must be restarted."""


class WeightReceiver:
    """The driver of one engine's weights. `run` it as a task beside the engine.

    Args:
        engine: an AsyncLLM started with `worker_extension_cls=WEIGHT_WORKER_EXTENSION`.
        actor_id: unique in the run.
        run_id: of the run; stores of other runs are refused.
        address: the publisher's `address`, or None until `set_address`.
        on_commit: called with the version while the engine is still paused; may be a coroutine function.
        on_probe: called with the probe of a version, and the version, once the engine generates with it.
        clear_cache: drop the KV cache at a swap (requests in flight recompute their prefix with the new
            weights); if False it is kept and prompts must carry `cache_salt`.
        deadline_s: longest single wait.
        initial_version: of the weights that the engine was started with.
        node: name of this host in the relay plan.
        expected: manifest that full pushes must fit; None derives it from the model's configuration.
    """

    def __init__(
        self,
        engine: Any,
        *,
        actor_id: str,
        run_id: str,
        address: str | None = None,
        on_commit: CommitCallback | None = None,
        on_probe: ProbeCallback | None = None,
        clear_cache: bool = True,
        deadline_s: float = 30.0,
        initial_version: int = 0,
        node: str | None = None,
        expected: Manifest | None = None,
    ) -> None:
        self._engine = engine
        self._actor_id = actor_id
        self._run_id = run_id
        self._on_commit, self._on_probe = on_commit, on_probe
        self._clear_cache = clear_cache
        self._deadline_s = deadline_s
        self._node = node or socket.gethostname()
        self._expected = expected or expected_manifest(engine.vllm_config.model_config)
        self._workers = engine.vllm_config.parallel_config.world_size
        self._address = Address.parse(address) if address else None
        self._address_changed = asyncio.Event()
        self._gate = CommitGate()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-client")
        self._origin: str | None = None  # token of the publisher that `version` came from
        self._generation = 0
        self._meters: dict[str, Any] = {
            "pushes": 0,
            "bytes": 0,
            "staged_s": 0.0,
            "stopped_ms": 0.0,
            "prepared": False,
        }
        self._failures: Counter[Cause] = Counter()
        self._adapter = False
        self.version = initial_version
        self.token_versions = TokenVersions(engine, initial_version)

    # ---------------------------------------------------------------- what the actor uses

    @property
    def origin(self) -> str | None:
        """Token of the publisher that `version` came from; None for the weights that the engine started with."""
        return self._origin

    @property
    def cache_salt(self) -> str | None:
        """What prompts must carry as `cache_salt` when the KV cache outlives a swap; None when it does not."""
        if self._clear_cache:
            return None
        return f"{self._origin or 'start'}:{self.version}"

    @property
    def lora(self) -> Any | None:
        """The `lora_request` that every prompt must carry; None when the engine was started without LoRA."""
        return adapter_request() if self._adapter else None

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[int]:
        """Postpones commits while inside, for an evaluation by one version; yields that version."""
        async with self._gate.hold():
            yield self.version

    async def set_address(self, address: str | None) -> None:
        """Another publisher (the learner was restarted), or None when there is none; the link is renewed."""
        parsed = Address.parse(address) if address else None
        if parsed != self._address:
            self._address = parsed
            self._address_changed.set()

    def meters(self) -> dict[str, Any]:
        """Version, pushes, bytes; of the last push seconds staged, milliseconds stopped and whether it was
        prepared for the engine beforehand; failures by cause."""
        failures = {str(cause): count for cause, count in self._failures.items()}
        return {"version": self.version, "generation": self._generation, **self._meters, "failures": failures}

    async def prepare(self) -> None:
        """To be awaited before the first prompt: labels what the engine was started with.

        An engine with LoRA gets an adapter that changes nothing, so that every request carries the adapter
        from its first token and goes on with the next one in place.
        """
        await self._label(self.version)
        if self._engine.vllm_config.lora_config is not None and not self._adapter:
            layer = neutral_layer(self._expected)
            await self._rpc("neutral_adapter", layer.name, list(layer.shape))
            self._adapter = True

    async def run(self) -> None:
        """Follows the learner until cancelled; does what `prepare` does unless that was done.

        Raises:
            EngineDamagedError: a commit failed; the engine is paused and must be restarted.
        """
        await self.prepare()
        delay = RETRY_S[0]
        while True:
            before = self._meters["pushes"]
            self._address_changed.clear()
            if self._address is not None:
                await self._one_link(self._address)
            if self._meters["pushes"] > before:
                delay = RETRY_S[0]
            timeout = None if self._address is None else delay
            with suppress(TimeoutError):
                await asyncio.wait_for(self._address_changed.wait(), timeout)
            delay = min(2 * delay, RETRY_S[1])

    # ---------------------------------------------------------------- one link

    async def _one_link(self, address: Address) -> None:
        """Serves one generation of the link until it fails or the address changes."""
        name = new_link_name(self._actor_id, self._generation)
        self._generation += 1
        spec = LinkSpec(str(address), self._run_id, name, self._workers, self._deadline_s)
        before = self._meters["pushes"]
        client: LinkClient | None = None
        leaving = False
        try:
            client = await self._in_thread(LinkClient, spec)
            await self._rpc("connect", spec.to_dict())
            held = self.version if self._origin == address.token else None
            await self._in_thread(client.register, self._actor_id, self._node, held)
            await self._follow(client, address)
            leaving = True
        except LinkError as error:
            self._failures[error.cause] += 1
            # The end of a link that has worked is news only if the next one fails, too: the learner may have left.
            level = logging.INFO if self._meters["pushes"] > before else logging.WARNING
            LOGGER.log(level, "weights: link of %s failed (%s): %s", self._actor_id, error.cause, error)
            if client is not None:
                await self._in_thread(client.tell_failed, error)
        except asyncio.CancelledError:
            leaving = True
            raise
        finally:
            if client is not None:
                await asyncio.shield(self._in_thread(client.close, goodbye=leaving))
            with suppress(LinkError, EngineDamagedError):  # who watches the engine says that it is dead
                await asyncio.shield(self._rpc("disconnect"))

    async def _follow(self, client: LinkClient, address: Address) -> None:
        """Takes one offer after the other; returns when the address has changed."""
        while True:
            offer = await self._unless_moved(asyncio.wrap_future(client.next_offer()))
            if offer is None:
                return
            if await self._accept(client, offer):
                await self._take(client, offer, address)

    async def _unless_moved(self, waiting: asyncio.Future[Offer]) -> Offer | None:
        moved = asyncio.ensure_future(self._address_changed.wait())
        try:
            both: set[asyncio.Future[Any]] = {waiting, moved}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            moved.cancel()
            if not waiting.done():
                waiting.cancel()

    async def _accept(self, client: LinkClient, offer: Offer) -> bool:
        """Starts staging, or refuses what does not fit this engine."""
        manifest = await self._in_thread(client.manifest, offer)
        reason = self._misfit(manifest)
        if reason is not None:
            self._failures[Cause.REFUSED] += 1
            LOGGER.error("weights: version %d refused: %s", offer.version, reason)
            await self._in_thread(client.tell, "refused", offer, reason=reason)
            return False
        await self._rpc("stage", offer.to_dict())
        await self._in_thread(client.tell, "accepted", offer)
        return True

    def _misfit(self, manifest: Manifest) -> str | None:
        if manifest.kind != "adapter":
            return manifest.difference(self._expected)
        if self._engine.vllm_config.lora_config is None:
            return "a LoRA adapter was pushed, but the engine was started without LoRA"
        return None

    async def _take(self, client: LinkClient, offer: Offer, address: Address) -> None:
        try:
            seconds = await self._staged(client, offer)
        except LinkError as error:
            if error.cause is not Cause.SUPERSEDED:
                raise
            self._failures[error.cause] += 1
            await self._in_thread(client.tell_failed, error, offer)
            return
        await self._in_thread(client.tell, "staged", offer)
        if self._gate.held:
            await self._in_thread(client.tell, "held", offer)
        async with self._gate.commit():
            stopped_ms = await self._commit(offer, address)
        self._meters["pushes"] += 1
        self._meters["bytes"] += offer.nbytes
        self._meters |= {"staged_s": seconds, "stopped_ms": stopped_ms}
        await self._in_thread(client.tell, "committed", offer, staged_s=seconds, stopped_ms=stopped_ms)
        if self._on_probe is not None and (probe := await self._in_thread(client.probe, offer)) is not None:
            self._on_probe(probe, offer.version)

    async def _staged(self, client: LinkClient, offer: Offer) -> float:
        """Seconds until all workers hold the version; bounded here too, should the store itself freeze."""
        try:
            async with asyncio.timeout(offer.push_deadline_s + self._deadline_s):
                return await asyncio.wrap_future(client.staged(offer))
        except TimeoutError:
            raise LinkError(Cause.STORE, "the weight store froze during a push") from None

    # ---------------------------------------------------------------- the swap

    async def _commit(self, offer: Offer, address: Address) -> float:
        """Pause, swap, label, resume. Returns the milliseconds that generation stood still."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(commit_deadline(self._deadline_s)):
                await self._engine.pause_generation(mode="keep", clear_cache=self._clear_cache)
                how = await self._engine.collective_rpc("slipstream_weights_commit", args=(offer.version,))
                await self._label(offer.version)
                self.version, self._origin = offer.version, address.token
                await self._called_back(offer.version)
                await self._engine.resume_generation()
        except Exception as error:
            raise EngineDamagedError(
                f"commit of version {offer.version} failed: {type(error).__name__}: {error}"
            ) from error
        self._meters["prepared"] = all(how)
        return (time.perf_counter() - started) * 1e3

    async def _label(self, version: int) -> None:
        if hasattr(self._engine, "update_weight_version"):
            await self._engine.update_weight_version(str(version))
        await self.token_versions.committed(version)

    async def _called_back(self, version: int) -> None:
        if self._on_commit is not None:
            outcome = self._on_commit(version)
            if inspect.isawaitable(outcome):
                await outcome

    # ---------------------------------------------------------------- plumbing

    async def _rpc(self, method: str, *args: Any) -> None:
        """Calls the worker extension on every worker; the engine answers between two steps."""
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._engine.collective_rpc(f"slipstream_weights_{method}", args=args)
        except TimeoutError:
            raise LinkError(Cause.DEADLINE, f"the engine did not answer {method}") from None
        except Exception as error:
            if self._engine.errored:
                raise EngineDamagedError(f"the engine is dead: {error}") from error
            raise LinkError(Cause.PEER_LOST, f"{method} failed in a worker: {error}") from error

    async def _in_thread(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Runs a call that may block for its own deadline, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
