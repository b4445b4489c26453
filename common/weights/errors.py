"""Why a weight push failed, as a small closed set of causes that meters can count.

Invariant: nothing that goes wrong on a link is fatal to the learner or to the engine; every failure is a
`LinkError` with exactly one `Cause`, so that status, MLflow and /metrics group failures the same way.
"""

from __future__ import annotations

from enum import StrEnum

from common.errors import SlipstreamError


class Cause(StrEnum):
    """What ended a push or a link (the label of the failure counters)."""

    DEADLINE = "deadline"  # a wait ran out: the peer is frozen, overloaded or gone without a trace
    PEER_LOST = "peer_lost"  # the connection was closed under us
    STORE = "store"  # the learner's rendezvous store cannot be reached
    FOREIGN_RUN = "foreign_run"  # the store on that port belongs to another run
    REFUSED = "refused"  # the receiver's model has other names, shapes or dtypes
    TRUNCATED = "truncated"  # a bucket arrived incomplete or out of order
    CHECKSUM = "checksum"  # a parameter differs from what the learner sent
    SUPERSEDED = "superseded"  # the learner dropped this version for a newer one
    UNWRITTEN = "unwritten"  # the learner could not write the version (disk or shared memory full)
    LEFT = "left"  # the receiver said goodbye


class LinkError(SlipstreamError):
    """A push failed on one link; generation goes on with the old weights and the link is opened anew."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class SupersededError(LinkError):
    """The version being moved was given up for a newer one; the link itself is healthy."""

    def __init__(self, version: int) -> None:
        super().__init__(Cause.SUPERSEDED, f"version {version} was superseded by a newer one")
