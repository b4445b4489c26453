"""A receiver without an engine: takes every version, keeps its checksums, and reconnects like an actor.

Invariant: it speaks the same protocol through the same `LinkClient` and `Stager` as the engine's driver, so
that elasticity, fan-out and bad input can be exercised with many receivers in little time; it also checks a
network path before a run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from common.weights.checksum import checksum
from common.weights.client import LinkClient
from common.weights.errors import Cause, LinkError
from common.weights.layout import Manifest
from common.weights.probe import Probe
from common.weights.protocol import LinkSpec, Offer, new_link_name
from common.weights.stager import Stager
from common.weights.store import POLL_S

CommitHook = Callable[[int, dict[str, str]], None]


@dataclass
class ScriptedReceiver:
    """One pretended actor.

    Args:
        address, run_id: of the publisher.
        actor_id, node: how it introduces itself.
        workers: receiving ranks (tensor parallel size).
        deadline_s: longest single wait.
        expected: manifest that offers must fit; None takes anything.
        on_commit: called with the version and each parameter's checksum as received.
        retry_s: pause before a new link is opened.
        device: where versions are staged.
        joins: False makes it accept offers and never receive them (a peer that does not join).
    """

    address: str
    run_id: str
    actor_id: str
    node: str = "localhost"
    workers: int = 1
    deadline_s: float = 10.0
    expected: Manifest | None = None
    on_commit: CommitHook | None = None
    retry_s: float = 0.1
    device: str = "cpu"
    joins: bool = True
    version: int | None = None
    errors: list[tuple[Cause, str]] = field(default_factory=list)
    probes: dict[int, Probe] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Serves one link after the other until `stop` is set."""
        generation = 0
        while not self.stop.is_set():
            name = new_link_name(self.actor_id, generation)
            spec = LinkSpec(self.address, self.run_id, name, self.workers, self.deadline_s)
            generation += 1
            try:
                self._serve(spec)
            except LinkError as error:
                self.errors.append((error.cause, str(error)))
            self.stop.wait(self.retry_s)

    def _serve(self, spec: LinkSpec) -> None:
        client = LinkClient(spec)
        stagers = [Stager(spec, rank, self.device) for rank in range(spec.workers)]
        try:
            client.register(self.actor_id, self.node, None)
            while (offer := self._next(client)) is not None:
                self._take(client, stagers, offer)
        except LinkError as error:
            client.tell_failed(error)
            raise
        finally:
            client.close(goodbye=self.stop.is_set())
            for stager in stagers:
                stager.close()

    def _next(self, client: LinkClient) -> Offer | None:
        future = client.next_offer()
        while not self.stop.wait(POLL_S):
            if future.done():
                return future.result()
        return None

    def _take(self, client: LinkClient, stagers: list[Stager], offer: Offer) -> None:
        reason = client.manifest(offer).difference(self.expected) if self.expected else None
        if reason is not None:
            self.errors.append((Cause.REFUSED, reason))
            client.tell("refused", offer, reason=reason)
            return
        for stager in stagers if self.joins else []:
            stager.stage(offer)
        client.tell("accepted", offer)
        try:
            seconds = client.staged(offer).result()
        except LinkError as error:
            if error.cause is not Cause.SUPERSEDED:
                raise
            client.tell_failed(error, offer)
            return
        client.tell("staged", offer)
        self._commit(stagers, offer.version)
        client.tell("committed", offer, staged_s=seconds, stopped_ms=0.0)
        if (probe := client.probe(offer)) is not None:
            self.probes[offer.version] = probe

    def _commit(self, stagers: list[Stager], version: int) -> None:
        for stager in stagers:
            staged = stager.take(version)
            if self.on_commit is not None:
                self.on_commit(version, {name: checksum(tensor) for name, tensor in staged.tensors()})
            staged.release()
        self.version = version
