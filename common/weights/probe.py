"""A probe: some tokens, and the log-probabilities that the learner gives them with the weights of one version.

Invariant (I6): an engine that holds the same version gives the same tokens the same log-probabilities, up to the
arithmetic of its kernels and dtype; by how much it differs is known for every push, also where no trained token is of
the version that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PROBE_TOKENS = 256  # an engine holds the logits of all of them at one time: vocabulary x 4 bytes each


@dataclass(frozen=True)
class Probe:
    """A probe of one version.

    Attributes:
        tokens: [n] token ids, 2 <= n <= `PROBE_TOKENS`.
        logprobs: [n - 1] log π of each token but the first given those before it, temperature 1, in nats.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def differences(self, logprobs: Sequence[float]) -> list[float]:
        """[n - 1] absolute differences to somebody else's log-probabilities of the same tokens, in nats.

        Raises:
            ValueError: there are not as many.
        """
        return [abs(mine - theirs) for mine, theirs in zip(self.logprobs, logprobs, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Probe:
        return cls(tuple(body["tokens"]), tuple(body["logprobs"]))
