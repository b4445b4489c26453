"""One host of a run: what runs there, and as whom.

Invariant: a host names each of its workers once, in the order in which they start.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

TEMPLATES = {
    "broker": "broker.service",
    "learner": "learner.service",
    "actor": "actor@.service",
}


class Role(StrEnum):
    """What a host does."""

    broker = "broker"
    learner = "learner"
    actor = "actor"
    all = "all"


@dataclass(frozen=True)
class Host:
    """One host of a run.

    Attributes:
        roles: what runs here.
        actors: instances of the actor unit that the target starts.
        output: folder of the units and their environment files.
        join: "HOST:PORT" of the broker; None: it is read from the run folder.
        user_manager: units of a user's own systemd instance instead of the system's.
        run_as: account of system units.
    """

    roles: tuple[Role, ...]
    actors: int
    output: Path
    join: str | None = None
    user_manager: bool = False
    run_as: str = "root"

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers of this host, in the order in which they start."""
        return tuple(name for name in TEMPLATES if Role.all in self.roles or Role(name) in self.roles)

    @property
    def shared(self) -> bool:
        """Whether the learner and actors share this host."""
        return {"learner", "actor"} <= set(self.workers) and self.actors > 0
