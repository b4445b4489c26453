"""Which policy the engine holds: (era, version).

Invariant: `version` and `era` change together, at a commit, to those of the weights that were committed; an
address that is merely announced changes nothing yet. The base model, which an engine starts with, is version 0
of every era: until the first commit the era follows the announcements.
"""

from __future__ import annotations

from common.messages import WeightsAddress

_REMEMBERED = 8  # publishers; an older one cannot have a push under way


class Policy:
    """The engine's policy, and the eras of the publishers that weights may come from."""

    def __init__(self) -> None:
        self.version = 0
        self.era = 0
        self.commits = 0
        self._eras: dict[str, int] = {}

    def announce(self, weights: WeightsAddress) -> None:
        """Weights of `weights.era` come from the publisher with this token."""
        self._eras[weights.token] = weights.era
        if not self.commits:
            self.era = weights.era
        while len(self._eras) > _REMEMBERED:
            self._eras.pop(next(iter(self._eras)))

    def committed(self, version: int, origin: str) -> None:
        """The engine now holds `version`, from the publisher with the token `origin`."""
        self.version, self.era = version, self._eras[origin]
        self.commits += 1
