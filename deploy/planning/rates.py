"""How fast the parts of a pipeline are.

Invariant: every rate is a positive number of seconds per unit with one meaning, whatever it was read from; the
simulation knows no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work.

    Attributes:
        decode_s: one decode step of an engine, whatever the number of sequences (weights read once).
        sequence_s: more per running sequence in that step.
        prompt_s: per token of a prompt, or of a prefix that is computed again after a push.
        hand_over_s: from a group's last token to the broker: verification and the way.
        train_fixed_s: one policy iteration step of the learner, whatever its size.
        train_token_s: more per trained token (prompt and response), all ranks together.
        publish_s: the learner's own part of a push (the snapshot).
        push_s: from the learner's commit until an actor holds the new weights.
        stop_s: generation stands still at a swap, beside what is computed again.
        checkpoint_s: the learner's time for one checkpoint.
        train_contention: how many times longer the learner takes while an engine computes; 1 where each has a machine
            of its own.
        decode_contention: how many times longer a decode step takes while the learner computes.
    """

    decode_s: float
    sequence_s: float
    train_token_s: float
    train_fixed_s: float = 0.0
    prompt_s: float = 0.0
    hand_over_s: float = 0.0
    publish_s: float = 0.0
    push_s: float = 0.0
    stop_s: float = 0.0
    checkpoint_s: float = 0.0
    train_contention: float = 1.0
    decode_contention: float = 1.0

    def step_s(self, running: int) -> float:
        """Seconds of one decode step with so many running sequences."""
        return self.decode_s + self.sequence_s * running

    def actor_rate(self, running: int) -> float:
        """Tokens per second of one actor that decodes so many sequences at once."""
        return running / self.step_s(running)

    @property
    def learner_rate(self) -> float:
        """Trained tokens per second, the fixed cost of a step left out."""
        return 1 / self.train_token_s

    def with_ranks(self, ranks: float, of: float = 1) -> Rates:
        """The same learner on `ranks` ranks instead of `of`, scaled without loss."""
        return replace(self, train_token_s=self.train_token_s * of / ranks)


def sequence_seconds(tokens_per_s: float, running: int, decode_s: float) -> float:
    """`Rates.sequence_s` of an engine that makes `tokens_per_s` at `running` sequences with that decode step.

    Raises:
        ValueError: the decode step alone is slower than that.
    """
    left = running / tokens_per_s - decode_s
    if left < 0:
        raise ValueError(
            f"{tokens_per_s:g} tokens/s at {running} sequences need decode steps of {1e3 * running / tokens_per_s:.3g} ms, "
            f"less than the {1e3 * decode_s:g} ms of one step"
        )
    return left / running
