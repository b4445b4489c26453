"""A run as a discrete-event simulation: simulated engines and learner around the broker's own ledger.

Invariant: every decision of the broker (what is leased, taken, filtered, expired) is made by `broker.ledger` and
`broker.staleness` themselves; simulated is only how long things take. The same arguments and seed give the same
run. No group is lost: `Outcome.ledger` is the ledger's own sum (I3).

The model of an engine is continuous batching: all running sequences gain one token per decode step, which takes
`decode_s + sequence_s * running`; a free slot is filled from its queue; prompts, and prefixes after a push, stop
decoding while they are computed. The learner takes one batch ahead, as `learner.feed` does. An actor asks for
groups whenever its engine has room; a request that waits carries the version that the actor holds, which it says as
soon as it changes. Each actor has its machine for itself, and the broker takes no time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from broker import staleness
from broker.group import Facts, Group, State
from broker.ledger import Ledger
from broker.state import rules_of
from common.recipe.schema import Recipe
from deploy.planning.rates import Rates
from deploy.planning.workload import Workload

EPSILON = 1e-9  # of a decode step: completions so close together are one event


class Slice(NamedTuple):
    """One simulated policy iteration step; seconds since the start of the run.

    `busy_s` is summed over actors and the run so far, as are `generated` tokens.
    """

    committed: float
    waiting_s: float
    training_s: float
    trained_tokens: int
    staleness: Counter[int]
    busy_s: float
    generated: int


@dataclass(frozen=True)
class Outcome:
    """What came out; means are over the steps after the warm-up.

    Attributes:
        step_s: seconds from one commit to the next; `training_s` those of them that the learner trains.
        learner_idle, actor_idle: shares of time, 0..1.
        staleness: share of trained tokens by versions of lag.
        tokens_s: generated tokens per second of all actors.
        group_s: seconds from a group's lease to its last token, over the whole run.
        steps: every simulated step.
        ledger: the broker's sum (I3).
    """

    step_s: float
    training_s: float
    learner_idle: float
    actor_idle: float
    staleness: dict[int, float]
    tokens_s: float
    group_s: float
    steps: list[Slice]
    ledger: dict[str, Any]

    @property
    def staleness_mean(self) -> float:
        """Versions, mean over trained tokens."""
        return sum(lag * share for lag, share in self.staleness.items())


def simulate(
    recipe: Recipe,
    rates: Rates,
    workload: Workload,
    *,
    actors: int | None = None,
    steps: int | None = None,
    warm_up: int = 2,
    seed: int = 0,
) -> Outcome:
    """Simulate a run.

    Args:
        recipe: its batch, rollout, staleness, evaluation and checkpoint settings count.
        actors: engines; default `actor.count`.
        steps: steps to simulate; default `run.steps`.
        warm_up: first steps that no mean counts; fewer where the run is too short.

    Returns:
        The outcome; deterministic in the arguments.
    """
    if steps is not None:
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": steps})})
    run = _Run(recipe, rates, workload, actors or recipe.actor.count, seed)
    run.go()
    return _outcome(run, min(warm_up, len(run.slices) - 1))


# --- one engine ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Job:
    """A group, or an evaluation (`group` None), in an engine; `versions` counts its tokens by version."""

    group: Group | None
    lengths: list[int]
    left: int
    since: float
    filtered: bool
    versions: Counter[int] = field(default_factory=Counter)
    prompted: bool = False


class _Engine:
    """Continuous batching. `position` counts decode steps; a sequence that starts at p ends at p + its length."""

    def __init__(self, rates: Rates, slots: int, prompt_tokens: float) -> None:
        self._rates, self._slots, self._prompt_tokens = rates, slots, prompt_tokens
        self._running: list[tuple[float, int, float, _Job]] = []  # heap: (end, tie-break, start, job)
        self._queue: deque[tuple[int, _Job]] = deque()
        self._ties = itertools.count()
        self._marks: list[float] = [0.0]  # positions from which on the versions below were held
        self._versions: list[int] = [0]
        self._position = self._now = self._free_at = 0.0
        self._starts = 0.0
        self._slower = 1.0
        self.busy_s = 0.0

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._versions[-1]

    @property
    def busy(self) -> bool:
        """Whether it computes."""
        return bool(self._running)

    @property
    def unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self._running) + len(self._queue)

    def add(self, now: float, job: _Job) -> None:
        """Take a job in; its sequences start as slots are free."""
        self.advance(now)
        self._queue.extend((length, job) for length in job.lengths)
        self._fill()

    def _fill(self) -> None:
        while self._queue and len(self._running) < self._slots:
            length, job = self._queue.popleft()
            if not job.prompted:
                job.prompted = True  # the others share it in the prefix cache
                self._stall(self._rates.prompt_s * self._prompt_tokens)
            end = self._position + length
            heapq.heappush(self._running, (end, next(self._ties), self._position, job))
            self._starts += self._position

    def _stall(self, seconds: float) -> None:
        self._free_at = max(self._free_at, self._now) + seconds

    def advance(self, now: float) -> None:
        """Let time pass. Never beyond the next completion."""
        if self._running:
            self.busy_s += now - self._now
            decoding = now - max(self._now, min(self._free_at, now))
            self._position += decoding / self._step_s()
        self._now = now

    def _step_s(self) -> float:
        return self._rates.step_s(len(self._running)) * self._slower

    def slow_down(self, now: float, factor: float) -> None:
        """From now on decode steps take `factor` times as long."""
        self.advance(now)
        self._slower = factor

    def next_completion(self) -> float:
        """When the next sequence ends; infinite when nothing runs."""
        if not self._running:
            return math.inf
        left = max(0.0, self._running[0][0] - self._position)
        return max(self._now, self._free_at) + left * self._step_s()

    def complete(self, now: float) -> list[_Job]:
        """The next sequence ends (now is its time), and those with it; returns the jobs that are complete thereby."""
        self.advance(now)
        self._position = max(self._position, self._running[0][0])  # whatever rounding left of the last token
        done = []
        while self._running and self._running[0][0] <= self._position + EPSILON:
            end, _, start, job = heapq.heappop(self._running)
            self._starts -= start
            self._count_versions(job, start, end)
            job.left -= 1
            if not job.left:
                done.append(job)
        self._fill()
        return done

    def _count_versions(self, job: _Job, start: float, end: float) -> None:
        first = bisect_right(self._marks, start) - 1
        bounds = [start, *self._marks[first + 1 :], end]
        for version, low, high in zip(self._versions[first:], bounds, bounds[1:], strict=False):
            tokens = round(high - start) - round(low - start)
            if tokens > 0:
                job.versions[version] += tokens

    def swap(self, now: float, version: int) -> None:
        """New weights: generation stops, and prefixes in flight are computed again."""
        self.advance(now)
        self._marks.append(self._position)
        self._versions.append(version)
        made = self._position * len(self._running) - self._starts
        prompts = len({id(job) for *_, job in self._running}) * self._prompt_tokens
        self._stall(self._rates.stop_s + self._rates.prompt_s * (made + prompts))


# --- one actor ----------------------------------------------------------------------------------------------


class _Actor:
    """An engine, what it may ask for, and the weights on their way to it."""

    def __init__(self, name: str, engine: _Engine, recipe: Recipe) -> None:
        self.name, self.engine = name, engine
        self._group_size = recipe.rollout.group_size
        self._leased = recipe.sequences_leased
        self.asked_version: int | None = None  # of the request that waits at the broker
        self.evaluating = False
        self.arrived = 0  # newest version that has arrived; swapped in when no evaluation holds it up
        self.alarm = 0  # number of the last completion that was scheduled: earlier ones are void

    def capacity(self) -> int:
        """Groups that the engine has room for."""
        return max(0, self._leased - self.engine.unfinished) // self._group_size


@dataclass(eq=False)
class _Training:
    """A step in the learner's hands since `started`: seconds of work `left` as of `since`, if undisturbed."""

    step: int
    jobs: list[_Job]
    tokens: int
    waited: float
    started: float
    left: float
    since: float
    slower: float = 1.0
    alarm: int = 0
    done: bool = False
    seconds: float = 0.0


# --- the run ------------------------------------------------------------------------------------------------


class _Run:
    """The event loop, the broker around the ledger, and the learner."""

    def __init__(self, recipe: Recipe, rates: Rates, workload: Workload, actors: int, seed: int) -> None:
        self._recipe, self._rates, self._workload = recipe, rates, workload
        self._seed = seed
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self.ledger = Ledger(rules_of(recipe, workload.questions))
        self.actors = [
            _Actor(
                f"actor-{number}",
                _Engine(rates, recipe.actor.max_sequences, workload.prompt_tokens),
                recipe,
            )
            for number in range(actors)
        ]
        self._line: dict[str, _Actor] = {}  # who waits for work, in the order of asking
        self._asked: Counter[int] = Counter()  # of those, how many with which version
        self._jobs: dict[Any, _Job] = {}
        self._evaluation: int | None = 0 if workload.eval_sequences else None  # version to evaluate
        self._wanted: int | None = 0  # step that the feed asks for
        self._ready: tuple[int, list[Group]] | None = None  # the batch taken ahead
        self._training: _Training | None = None
        self._slowed = self._saving = False  # the engines, by the learner; a checkpoint is being written
        self._idle_since = 0.0
        self._generated = self._groups = 0
        self._group_seconds = 0.0
        self.slices: list[Slice] = []

    @property
    def group_s(self) -> float:
        """Mean seconds of a group in an engine."""
        return self._group_seconds / max(1, self._groups)

    def go(self) -> None:
        """Run to the last step."""
        for actor in self.actors:
            self._ask(actor)
        self._settle()
        while self._events and not self.ledger.finished:
            self._now, _, event = heapq.heappop(self._events)
            event()
        for actor in self.actors:
            actor.engine.advance(self._now)

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    # --- the broker ------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """The ledger has changed: the learner first, then those who wait for work."""
        self._take()
        self._serve()

    def _serve(self) -> None:
        while (actor := self._next_in_line()) is not None:
            self._grant(actor)

    def _next_in_line(self) -> _Actor | None:
        """First come, first served; a thousand actors that wait cost a look at their few versions."""
        versions = {version for version, waiting in self._asked.items() if waiting}
        room = {version for version in versions if self.ledger.room(version)}
        if not room and self._evaluation is None:
            return None
        for actor in self._line.values():
            if self._may_evaluate(actor) or (actor.asked_version in room and self._share(actor)):
                return actor
        return None

    def _may_evaluate(self, actor: _Actor) -> bool:
        wanted = self._evaluation
        held = actor.asked_version
        return wanted is not None and held is not None and held >= wanted and not actor.evaluating

    def _share(self, actor: _Actor) -> int:
        rules = self.ledger.rules
        fair = staleness.fair_share(rules.groups_per_step, rules.max_staleness, len(self.actors))
        return max(0, min(actor.capacity(), fair - self.ledger.held_by(actor.name)))

    def _grant(self, actor: _Actor) -> None:
        del self._line[actor.name]
        evaluates = self._may_evaluate(actor)
        version, actor.asked_version = actor.asked_version, None
        assert version is not None, "only those who ask are in line"
        self._asked[version] -= 1
        share = self._share(actor)
        if evaluates:
            self._evaluation, actor.evaluating = None, True
            actor.engine.add(self._now, self._job(None, self._workload.eval_sequences))
        for group in self.ledger.lease(actor.name, share, era=0, version=version, now=self._now):
            actor.engine.add(self._now, self._job(group, self._recipe.rollout.group_size))
        self._schedule(actor)
        self._engines_changed()
        self._ask(actor)

    def _job(self, group: Group | None, size: int) -> _Job:
        # Drawn by question, not by turn, so that settings are compared on the same responses.
        which = (0, 0, len(self.slices)) if group is None else (1, group.key.epoch, group.key.index)
        rng = np.random.default_rng((self._seed, *which))
        lengths = self._workload.lengths.draw(rng, size)
        return _Job(group, lengths, size, self._now, rng.random() < self._workload.filtered_share)

    # --- actors ----------------------------------------------------------------------------------------------

    def _ask(self, actor: _Actor) -> None:
        if actor.capacity() and actor.asked_version is None:
            actor.asked_version = actor.engine.version
            self._asked[actor.asked_version] += 1
            self._line[actor.name] = actor
            self._serve()

    def _schedule(self, actor: _Actor) -> None:
        actor.alarm += 1
        alarm, when = actor.alarm, actor.engine.next_completion()
        if math.isfinite(when):
            self._at(when, lambda: self._completed(actor) if actor.alarm == alarm else None)

    def _completed(self, actor: _Actor) -> None:
        for job in actor.engine.complete(self._now):
            self._generated += sum(job.lengths)
            if job.group is None:
                actor.evaluating = False
                self._swap(actor)
            else:
                self._groups += 1
                self._group_seconds += self._now - job.since
                self._at(self._now + self._rates.hand_over_s, partial(self._publish, actor, job))
        self._schedule(actor)
        self._engines_changed()
        self._ask(actor)

    def _publish(self, actor: _Actor, job: _Job) -> None:
        group = job.group
        assert group is not None
        facts = Facts(
            key=group.key,
            lease=group.lease,
            actor=actor.name,
            era=0,
            oldest=min(job.versions),
            newest=max(job.versions),
            reward=0.0,
            tokens=sum(job.lengths),
            zero_variance=job.filtered,
        )
        if self.ledger.publish(facts).status == "accepted":
            self._jobs[group.key] = job
        self._settle()

    def _arrive(self, actor: _Actor, version: int) -> None:
        actor.arrived = max(actor.arrived, version)
        if not actor.evaluating:
            self._swap(actor)

    def _swap(self, actor: _Actor) -> None:
        if actor.arrived <= actor.engine.version:
            return
        actor.engine.swap(self._now, actor.arrived)
        self._schedule(actor)
        if actor.asked_version is not None:
            self._asked[actor.asked_version] -= 1
            actor.asked_version = actor.engine.version
            self._asked[actor.asked_version] += 1
            self._serve()

    # --- the learner -----------------------------------------------------------------------------------------

    def _take(self) -> None:
        if (
            self._wanted is None
            or self._wanted != self.ledger.next_step
            or self._wanted > self.ledger.step + 1
        ):
            return
        groups = self.ledger.take(self._wanted)
        if groups is not None:
            self._ready, self._wanted = (self._wanted, groups), None
            self._train()

    def _train(self) -> None:
        if self._training is not None or self._saving or self._ready is None:
            return
        (step, groups), self._ready = self._ready, None
        if step < self.ledger.last_step:
            self._wanted = step + 1
        jobs = [self._jobs.pop(group.key) for group in groups if group.state == State.TAKEN]
        once = sum(sum(job.lengths) + len(job.lengths) * self._workload.prompt_tokens for job in jobs)
        tokens = round(once * self._recipe.algorithm.epochs)
        work = self._rates.train_fixed_s + self._rates.train_token_s * tokens
        self._training = _Training(
            step, jobs, tokens, self._now - self._idle_since, self._now, work, self._now
        )
        self._share_machine()
        self._take()

    def _share_machine(self) -> None:
        """Learner and engines slow each other down where they compute on one machine (`Rates.train_contention`)."""
        training, rates = self._training, self._rates
        busy = any(actor.engine.busy for actor in self.actors)
        if training is not None and not training.done:
            training.left -= (self._now - training.since) / training.slower
            training.since, training.slower = self._now, rates.train_contention if busy else 1.0
            training.alarm += 1
            alarm, when = training.alarm, self._now + max(0.0, training.left) * training.slower
            self._at(when, lambda: self._trained(training) if training.alarm == alarm else None)
        if rates.decode_contention != 1 and self._slowed != (training is not None):
            self._slowed = training is not None
            for actor in self.actors:
                actor.engine.slow_down(self._now, rates.decode_contention if self._slowed else 1.0)
                self._schedule(actor)

    def _engines_changed(self) -> None:
        if self._rates.train_contention != 1:
            self._share_machine()

    def _trained(self, training: _Training) -> None:
        training.done, training.seconds = True, self._now - training.started
        self._at(self._now + self._rates.publish_s, lambda: self._commit(training))

    def _commit(self, training: _Training) -> None:
        version = training.step + 1
        self.ledger.commit(training.step, version)
        self._note(training)
        self._training = None
        self._share_machine()
        if self._workload.eval_sequences and version % self._recipe.eval.every == 0:
            self._evaluation = version
        for actor in self.actors:
            self._at(self._now + self._rates.push_s, partial(self._arrive, actor, version))
        due = version % self._recipe.learner.checkpoint_every == 0
        self._saving = due and self._rates.checkpoint_s > 0
        if self._saving:
            self._at(self._now + self._rates.checkpoint_s, self._free)
        else:
            self._free()
        self._settle()

    def _free(self) -> None:
        self._saving, self._idle_since = False, self._now
        self._train()

    def _note(self, training: _Training) -> None:
        lags: Counter[int] = Counter()
        for job in training.jobs:
            for version, count in job.versions.items():
                lags[training.step - version] += count
        for actor in self.actors:
            actor.engine.advance(self._now)
        busy = sum(actor.engine.busy_s for actor in self.actors)
        self.slices.append(
            Slice(self._now, training.waited, training.seconds, training.tokens, lags, busy, self._generated)
        )


def _outcome(run: _Run, warm_up: int) -> Outcome:
    before, counted = run.slices[warm_up], run.slices[warm_up + 1 :] or run.slices[-1:]
    start = before.committed if before is not counted[-1] else 0.0
    seconds, last = counted[-1].committed - start, counted[-1]
    earlier = before if start else Slice(0.0, 0.0, 0.0, 0, Counter(), 0.0, 0)
    lags: Counter[int] = sum((piece.staleness for piece in counted), Counter())
    total = lags.total()
    busy = (last.busy_s - earlier.busy_s) / (seconds * len(run.actors)) if seconds else 1.0
    return Outcome(
        step_s=seconds / len(counted),
        training_s=sum(piece.training_s for piece in counted) / len(counted),
        learner_idle=sum(piece.waiting_s for piece in counted) / seconds if seconds else 0.0,
        actor_idle=max(0.0, 1.0 - busy),
        staleness={lag: count / total for lag, count in sorted(lags.items())},
        tokens_s=(last.generated - earlier.generated) / seconds if seconds else 0.0,
        group_s=run.group_s,
        steps=run.slices,
        ledger=run.ledger.counts(),
    )
