"""Everything a broker knows of its run, in one place that handlers, status and journal share.

Invariant: `ledger` and `extra()` together are what a restart needs; the rest (members, waiting requests, rates)
is learnt anew from the peers within a heartbeat.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from broker.checks import Limits
from broker.evaluation import Evaluations
from broker.group import Rules
from broker.ledger import Ledger
from broker.members import Members
from broker.meters import Meters
from broker.standstill import Standstill
from broker.store import Store
from common.messages import EvalQuestion, WeightsAddress
from common.recipe.schema import Recipe
from common.run_files import SPOOL
from common.tasks.from_recipe import held_out_questions, training_questions
from common.tracking.spool import Spool

log = logging.getLogger("slipstream.broker")

EVENTS_KEPT = 100


def rules_of(recipe: Recipe, questions: int) -> Rules:
    """The ledger's rules for a recipe with so many training questions."""
    return Rules(
        questions=questions,
        groups_per_step=recipe.batch.questions_per_step,
        steps=recipe.run.steps,
        max_staleness=recipe.batch.max_staleness,
        max_epochs=recipe.data.max_epochs,
        seed=recipe.run.seed,
        max_attempts=recipe.broker.max_attempts,
        lease_s=recipe.broker.lease_s,
        lease_max_s=recipe.broker.lease_max_s,
        unlisted_s=recipe.broker.dead_after_s,
        zero_variance=recipe.equal_rewards,
    )


def load_training_set(recipe: Recipe) -> list[dict[str, Any]]:
    """The training questions in file order."""
    return [dict(row) for row in training_questions(recipe)]


def load_held_out(recipe: Recipe) -> list[EvalQuestion]:
    """The questions of all evaluation sets."""
    return [
        EvalQuestion(set=found.name, uid=str(row["uid"]), question=dict(row))
        for found in held_out_questions(recipe).values()
        for row in found
    ]


def evaluations_of(recipe: Recipe, held_out: Sequence[EvalQuestion]) -> Evaluations:
    """The evaluation schedule of a recipe."""
    return Evaluations(
        questions=held_out,
        every=recipe.eval.every,
        samples=recipe.eval.samples,
        temperature=recipe.eval.temperature,
        max_tokens=recipe.eval.max_tokens or recipe.rollout.max_tokens,
        lease_max_s=recipe.broker.lease_max_s,
    )


class RunState:
    """The run as the broker sees it.

    Args:
        recipe: with `run.name` set.
        folder: the run folder.
        questions: training rows (`problem`, `answer`, ...), in file order.
        held_out: evaluation questions.
        store: where groups are kept.
        ledger: as restored from a journal, or None for a new run.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        questions: Sequence[dict[str, Any]],
        held_out: Sequence[EvalQuestion],
        store: Store,
        ledger: Ledger | None = None,
    ) -> None:
        self.recipe, self.folder, self.questions, self.store = recipe, folder, questions, store
        self.ledger = ledger or Ledger(rules_of(recipe, len(questions)))
        self.resumed = ledger is not None
        self.limits = Limits.of(recipe)
        self.members = Members(recipe.broker.dead_after_s, recipe.broker.max_bad_messages)
        self.evaluations = evaluations_of(recipe, held_out)
        self.meters = Meters()
        self.standstill = Standstill(recipe.broker.no_progress_s)
        self.spool = Spool(folder / SPOOL)
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.tokenizer: str | None = None
        self.weights: WeightsAddress | None = None
        self.pinned: dict[str, Any] | None = None
        self.last_train: dict[str, Any] | None = None
        self.started = time.time()
        self.first_lease_time: float | None = None
        self.last_commit_time: float | None = None
        self.ending: str | None = None  # why the run ends, once it does
        self.disk_full: str | None = None
        self.changed = True  # `extra` has changed since it was saved

    def save(self) -> None:
        """Make everything so far durable. Raises StoreFull."""
        self.store.save(self.ledger, self.extra if self.changed else None, self.evaluations.unsaved)
        self.evaluations.unsaved.clear()
        self.changed = False

    def event(self, text: str, *, warning: bool = False) -> None:
        """Something a person may want to know: kept for `status`, and a point of the run's metrics."""
        entry = {"time": time.time(), "step": self.ledger.step, "text": text, "warning": warning}
        self.events.append(entry)
        self.spool.append("event", self.ledger.step, {"text": text, "warning": warning})

    def defect(self, kind: str, error: Exception) -> None:
        """Our own defect, while an exception is handled: it may cost a sender an answer, but not the run its broker."""
        log.exception("a %s could not be answered", kind)
        self.event(f"defect: a {kind} could not be answered: {error!r}", warning=True)

    def extra(self) -> dict[str, Any]:
        """What the journal keeps besides the ledger (plain types)."""
        return {
            "tokenizer": self.tokenizer,
            "weights": msgspec.to_builtins(self.weights),
            "pinned": self.pinned,
            "last_train": self.last_train,
            "first_lease_time": self.first_lease_time,
            "last_commit_time": self.last_commit_time,
            "actors": [
                [peer.name, peer.host, peer.pid, peer.software, peer.process]
                for peer in self.members.living("actor")
            ],
            "evaluations": self.evaluations.state(),
            "meters": self.meters.state(),
        }

    def restore(self, extra: dict[str, Any], now: float) -> None:
        """As saved by `extra`. Actors are taken to live on until they are silent for too long, as ever."""
        for actor in extra["actors"]:
            self.members.expect(*actor, now=now)
        self.tokenizer, self.pinned = extra["tokenizer"], extra["pinned"]
        self.weights = WeightsAddress(**extra["weights"]) if extra["weights"] else None
        self.last_train = extra["last_train"]
        self.first_lease_time, self.last_commit_time = extra["first_lease_time"], extra["last_commit_time"]
        self.evaluations.restore(extra["evaluations"], self.store.results())
        self.meters.restore(extra["meters"])

    @property
    def over(self) -> bool:
        """Whether all is done: the last step is committed and the last evaluation is in."""
        return self.ledger.finished and self.evaluations.settled
