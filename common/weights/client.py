"""The receiving end's conversation with the publisher: one object per generation of a link.

Invariant: every call returns or raises `LinkError` within its deadline; after an error the object is closed
and a new one, under a new name, takes its place. What the caller does between `accept` and `committed` is up
to it: the engine's driver and the scripted receivers of the tests differ there only.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future
from dataclasses import asdict

from common.weights.errors import Cause, LinkError
from common.weights.layout import Manifest
from common.weights.probe import Probe
from common.weights.protocol import (
    EVENTS,
    LinkSpec,
    Offer,
    Registration,
    decode,
    probe_key,
    push_deadline,
)
from common.weights.store import OPERATION_DEADLINE_S, POLL_S, Address, StoreClient

GOODBYE_S = 1.0  # a frozen learner must not keep a receiver from turning to the next one


class LinkClient:
    """Registers a link and follows its offers.

    Args:
        spec: address, run and name of the link, and its number of workers.

    Raises:
        LinkError: STORE or FOREIGN_RUN, see `StoreClient`.
    """

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        deadline = min(spec.deadline_s, OPERATION_DEADLINE_S)
        self._client = StoreClient(Address.parse(spec.address), spec.run_id, deadline_s=deadline)
        self._offers_seen = 0

    def register(self, actor_id: str, node: str, version: int | None) -> None:
        """Announces the link; `version` is what the receiver already holds from this very publisher."""
        registration = Registration(self.spec.link, actor_id, node, self.spec.workers, version)
        self._client.push(EVENTS, {"event": "register", **asdict(registration)})

    def next_offer(self) -> Future[Offer]:
        """Future of the next offer, however long it takes; fails when the publisher drops the link."""
        key = f"{self.spec.link}/offer/{self._offers_seen}"
        self._offers_seen += 1
        return self._client.submit(lambda: Offer.from_dict(self._await([key], None)[0]))

    def manifest(self, offer: Offer) -> Manifest:
        return Manifest.from_json(self._client.text(f"manifest/{offer.manifest}"))

    def probe(self, offer: Offer) -> Probe | None:
        """The probe of the offered version, if there is one and no newer version has taken its place."""
        found = self._client.text_if_set(probe_key(offer.push))
        return None if found is None else Probe.from_dict(decode(found))

    def staged(self, offer: Offer) -> Future[float]:
        """Future of the seconds until all workers hold the version, checked.

        Fails with the cause that the first failing worker gave, or DEADLINE.
        """
        keys = [f"{self.spec.link}/staged/{offer.push}/{rank}" for rank in range(self.spec.workers)]
        timeout = push_deadline(offer.nbytes, offer.deadline_s)
        return self._client.submit(lambda: _slowest(self._await(keys, timeout)))

    def tell(self, event: str, offer: Offer, **fields: object) -> None:
        """Sends "accepted", "refused", "staged", "held" or "committed" for an offer."""
        self._client.push(EVENTS, {"event": event, "link": self.spec.link, "push": offer.push, **fields})

    def tell_failed(self, error: LinkError, offer: Offer | None = None) -> None:
        """Tells why this link (or, for SUPERSEDED, this push only) ended, if anybody still listens."""
        if offer is None:
            self._client.interrupt()
        fields = {"cause": error.cause, "reason": str(error), "push": offer.push if offer else None}
        with contextlib.suppress(LinkError):
            self._client.push(EVENTS, {"event": "failed", "link": self.spec.link, **fields})

    def close(self, *, goodbye: bool = False) -> None:
        """Leaves. With `goodbye` the publisher learns it at once instead of at the next push."""
        self._client.interrupt()
        if goodbye:
            with contextlib.suppress(LinkError):
                self._client.push(EVENTS, {"event": "bye", "link": self.spec.link}, GOODBYE_S)
        self._client.close()

    def _await(self, keys: list[str], timeout: float | None) -> list:
        """Values of `keys` once all are set; each is deleted. Runs in the store client's thread.

        A failed report of any worker is returned early: the others may never report.
        """
        store, end = self._client.store, None if timeout is None else time.monotonic() + timeout
        found: dict[str, dict] = {}
        while len(found) < len(keys):
            for key in keys:
                if key not in found and store.check([key]):
                    found[key] = decode(store.get(key))
                    store.delete_key(key)
            if len(found) == len(keys) or any(value.get("ok") is False for value in found.values()):
                break
            if store.check([f"{self.spec.link}/dropped"]):
                reason = decode(store.get(f"{self.spec.link}/dropped"))
                raise LinkError(Cause.PEER_LOST, f"the learner dropped the link: {reason}")
            if end is not None and time.monotonic() > end:
                raise LinkError(Cause.DEADLINE, f"not staged within {timeout:g} s")
            self._client.pause(POLL_S)
        return list(found.values())


def _slowest(reports: list[dict]) -> float:
    for report in reports:
        if not report["ok"]:
            raise LinkError(Cause(report["cause"]), report["reason"])
    return max(report["seconds"] for report in reports)
