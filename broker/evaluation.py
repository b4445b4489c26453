"""Held-out evaluations: when one is due, who answers it, what came out.

Invariant: an evaluation is answered whole by one actor at one version of the surviving history, `requested` or
later; at most one waits, a newer one replaces it. Training never waits for an evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.evaluation_metrics import metrics_of
from common.messages import EvalJob, EvalQuestion, EvalResult

MAX_RETURNS = 3  # of a job, before it is given up: no actor could answer it


@dataclass(slots=True)
class Running:
    """A job in an actor's hands since `since` (broker's monotonic clock)."""

    job: EvalJob
    actor: str
    since: float


@dataclass
class Evaluations:
    """The schedule. `questions` of all sets; `every` in versions; `results` by number of the job.

    `unsaved` holds what has changed of the results since the journal was written; None for one that is gone.
    """

    questions: Sequence[EvalQuestion]
    every: int
    samples: int
    temperature: float
    max_tokens: int
    lease_max_s: float
    waiting: EvalJob | None = None
    running: dict[int, Running] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    unsaved: dict[int, dict[str, Any] | None] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    returns: Counter[int] = field(default_factory=Counter)  # by number of the job
    final_version: int | None = None
    next_job: int = 1

    @property
    def history(self) -> list[dict[str, Any]]:
        """All results, oldest first."""
        return list(self.results.values())

    @property
    def accuracy(self) -> list[tuple[int, float]]:
        """(version, accuracy) of all results: sampled at the recipe's temperature, else greedy."""
        found = ((r["version"], r.get("pass1", r.get("greedy"))) for r in self.results.values())
        return [(version, value) for version, value in found if value is not None]

    def at(self, version: int, *, final: bool) -> bool:
        """Version `version` exists: ask for an evaluation if one is due. True when asked."""
        if final:
            self.final_version = version
        due = final or version % self.every == 0
        if not self.questions or not due or version in self.asked:
            return False
        self.asked.add(version)
        self.waiting = self._job(version, self.next_job)
        self.next_job += 1
        return True

    def _job(self, version: int, number: int) -> EvalJob:
        return EvalJob(
            job=number,
            requested=version,
            questions=list(self.questions),
            samples=self.samples,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )

    def wants(self, version: int) -> bool:
        """Whether a job waits that `version` is new enough for."""
        return self.waiting is not None and version >= self.waiting.requested

    def open_to(self, actor: str, version: int) -> bool:
        """Whether this actor may have the waiting job: it has none in hand."""
        return self.wants(version) and all(running.actor != actor for running in self.running.values())

    def grant(self, actor: str, version: int, now: float) -> EvalJob | None:
        """The waiting job, for an actor that is new enough and has none in hand."""
        job = self.waiting
        if job is None or not self.open_to(actor, version):
            return None
        self.waiting = None
        self.running[job.job] = Running(job, actor, now)
        return job

    def drop_actor(self, actor: str) -> None:
        """The actor is gone: its job waits again, unless a newer one does."""
        for running in [r for r in self.running.values() if r.actor == actor]:
            self._put_back(running)

    def hand_back(self, actor: str, number: int) -> bool:
        """The actor could not answer this job: it waits for another; False when it has been given up instead."""
        running = self.running.get(number)
        if running is None or running.actor != actor:
            return True
        self.returns[number] += 1
        if self.returns[number] >= MAX_RETURNS:
            del self.running[number]
            return False
        self._put_back(running)
        return True

    def tick(self, now: float) -> None:
        """Jobs that take too long wait again."""
        for running in [r for r in self.running.values() if now - r.since > self.lease_max_s]:
            self._put_back(running)

    def _put_back(self, running: Running) -> None:
        del self.running[running.job.job]
        if self.waiting is None or self.waiting.requested < running.job.requested:
            self.waiting = running.job

    def result(self, message: EvalResult) -> dict[str, Any] | None:
        """Take in a result; its metrics, or None when it is nobody's any more (a duplicate, or replaced).

        Raises:
            ValueError: it does not answer each question of the job once, or is of an older version.
        """
        job = self._find(message.job)
        if job is None:
            return None
        if message.version < job.requested:
            raise ValueError(f"version {message.version} answers an evaluation of version {job.requested}")
        if Counter((q.set, q.uid) for q in job.questions) != Counter((r.set, r.uid) for r in message.rows):
            raise ValueError(
                f"{len(message.rows)} rows do not answer the {len(job.questions)} questions once each"
            )
        self.running.pop(message.job, None)
        if self.waiting is job:
            self.waiting = None
        entry = {"version": message.version, "requested": job.requested, "seconds": message.seconds}
        entry.update(metrics_of(message.rows))
        self.results[message.job] = self.unsaved[message.job] = entry
        return entry

    def _find(self, number: int) -> EvalJob | None:
        if number in self.running:
            return self.running[number].job
        return self.waiting if self.waiting is not None and self.waiting.job == number else None

    def rewind(self, version: int) -> None:
        """Versions after `version` are gone, and so is what was found out about them."""
        for number in [n for n, entry in self.results.items() if entry["version"] > version]:
            del self.results[number]
            self.unsaved[number] = None
        self.asked = {asked for asked in self.asked if asked <= version}
        self.running = {n: r for n, r in self.running.items() if r.job.requested <= version}
        if self.waiting is not None and self.waiting.requested > version:
            self.waiting = None
        self.final_version = None

    @property
    def settled(self) -> bool:
        """Whether the evaluation of the final version is in, or none is asked for."""
        if not self.questions:
            return True
        return self.final_version is not None and any(
            entry["requested"] == self.final_version for entry in self.results.values()
        )

    def state(self) -> dict[str, Any]:
        """For the journal, beside the results: which versions were asked for; the newest open job is asked for again."""
        jobs = [running.job for running in self.running.values()]
        jobs += [self.waiting] if self.waiting is not None else []
        return {
            "asked": sorted(self.asked),
            "open": max(((job.requested, job.job) for job in jobs), default=None),
            "final_version": self.final_version,
            "next_job": self.next_job,
        }

    def restore(self, state: Mapping[str, Any], results: Mapping[int, dict[str, Any]]) -> None:
        """As saved by `state`. A job keeps its number, so that the actor that holds it can still answer."""
        self.results, self.asked = dict(results), set(state["asked"])
        self.final_version, self.next_job = state["final_version"], state["next_job"]
        if state["open"] is not None and self.questions:
            self.waiting = self._job(*state["open"])
