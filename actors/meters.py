"""What an actor reports about itself.

Invariant: counters only grow and rates are taken between two reports, so a lost heartbeat loses nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from actors.engine import Sample
from actors.scoring import Score


class Meters:
    """Counters of the actor's life: groups, responses, tokens, verdicts, answers of the broker."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._since = time.monotonic()

    def generated(self, samples: Sequence[Sample], seconds: float) -> None:
        """A group was sampled in `seconds`."""
        self.counts["generated_groups"] += 1
        self.counts["generated_responses"] += len(samples)
        self.counts["generated_tokens"] += sum(len(sample.tokens) for sample in samples)
        self.counts["generate_ms"] += round(1000 * seconds)

    def scored(self, scores: Sequence[Score], seconds: float) -> None:
        """A group was verified in `seconds`."""
        self.counts["verify_ms"] += round(1000 * seconds)
        for score in scores:
            self.counts[f"verdict_{score.verdict}"] += 1

    def published(self, status: str) -> None:
        """The broker's answer to a group: accepted, duplicate, filtered, expired or refused."""
        self.counts[f"groups_{status}"] += 1

    def report(self) -> dict[str, float]:
        """All counters, and rates since the last report."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-3)
        new = self.counts - self._reported
        self._reported, self._since = Counter(self.counts), now
        rates = {
            "tokens_per_s": new["generated_tokens"] / seconds,
            "groups_per_s": new["generated_groups"] / seconds,
        }
        return rates | {name: float(count) for name, count in self.counts.items()}
