"""What the broker measures of the groups that pass through it: lengths, staleness, rates.

Invariant: each number has its denominator: lengths are per response and per fate, staleness is per trained token.
The length distribution of what was *sampled* beside that of what was *trained* shows whether long responses are
selected against (issue: dropping by age alone prefers short answers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from broker.profile import Profile
from broker.rollouts import Rollouts

# 2 ... 1,048,576 tokens, two buckets per octave
EDGES = np.array([round(2 ** (k / 2)) for k in range(2, 41)])
FOLD = 4096
FATES = ("sampled", "trained", "filtered", "expired")


class Lengths:
    """A histogram of response lengths in tokens, with exact count and sum."""

    def __init__(self) -> None:
        self.count, self.total, self.longest = 0, 0, 0
        self._buckets = np.zeros(len(EDGES) + 1, dtype=np.int64)
        self._fresh: list[int] = []  # counted, not yet in a bucket: one pass for many is a tenth of the work

    def add(self, lengths: Sequence[int]) -> None:
        """Count responses, at least one."""
        self.count += len(lengths)
        self.total += sum(lengths)
        self.longest = max(self.longest, *lengths)
        self._fresh += lengths
        if len(self._fresh) >= FOLD:
            self._fold()

    def _fold(self) -> None:
        places = np.searchsorted(EDGES, self._fresh)
        self._buckets += np.bincount(places, minlength=len(self._buckets))
        self._fresh.clear()

    @property
    def buckets(self) -> list[int]:
        """Responses by bucket: up to each edge, and above the last."""
        if self._fresh:
            self._fold()
        return self._buckets.tolist()

    def quantile(self, share: float) -> float:
        """Length below which `share` of the responses lie: the upper edge of its bucket, in tokens."""
        wanted, seen = share * self.count, 0
        for edge, count in zip(EDGES.tolist(), self.buckets, strict=False):
            seen += count
            if seen >= wanted:
                return float(min(edge, self.longest))
        return float(self.longest)

    def view(self) -> dict[str, float]:
        """Count, mean, quantiles (upper bucket edges) and maximum."""
        if not self.count:
            return {"count": 0}
        quantiles = {f"p{round(100 * q)}": self.quantile(q) for q in (0.5, 0.9, 0.99)}
        return {"count": self.count, "mean": self.total / self.count, **quantiles, "max": self.longest}

    def state(self) -> list[Any]:
        """For the journal."""
        return [self.count, self.total, self.longest, self.buckets]

    def restore(self, state: list[Any]) -> None:
        """As saved by `state`."""
        self.count, self.total, self.longest = state[:3]
        self._buckets = np.array(state[3], dtype=np.int64)
        self._fresh.clear()


class Meters:
    """Lengths by fate, staleness of trained tokens (versions), bytes and messages in and out."""

    def __init__(self) -> None:
        self.lengths = {fate: Lengths() for fate in FATES}
        self.staleness: Counter[int] = Counter()
        self.last_staleness: Counter[int] = Counter()
        self.rollouts = Rollouts()
        self.bytes_in = self.bytes_out = self.messages_in = self.bad_messages = 0

    def trained(self, step: int, profiles: Iterable[Profile]) -> None:
        """Count the groups of a committed step."""
        self.last_staleness = Counter()
        for profile in profiles:
            self.lengths["trained"].add(profile.lengths)
            for version, tokens in profile.versions.items():
                self.last_staleness[step - version] += tokens
        self.staleness.update(self.last_staleness)

    def staleness_view(self) -> dict[str, Any]:
        """Histogram over trained tokens of the run, its mean and maximum, in versions."""
        tokens = self.staleness.total()
        mean = sum(age * count for age, count in self.staleness.items()) / tokens if tokens else 0.0
        return {
            "histogram": {str(age): count for age, count in sorted(self.staleness.items())},
            "mean": mean,
            "max": max(self.staleness, default=0),
            "last_max": max(self.last_staleness, default=0),
        }

    def state(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "lengths": {fate: lengths.state() for fate, lengths in self.lengths.items()},
            "staleness": [[age, count] for age, count in self.staleness.items()],
            "rollouts": self.rollouts.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As saved by `state`."""
        for fate, saved in state["lengths"].items():
            self.lengths[fate].restore(saved)
        self.staleness = Counter(dict(state["staleness"]))
        self.rollouts.restore(state["rollouts"])
