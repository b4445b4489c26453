"""The learner process: take, train, push, commit, checkpoint; again and again.

Invariants: the learner never dies because the broker is away: it waits, says so, and sends again (I4). All ranks
take every decision alike. After a restart it continues from the newest checkpoint whose steps the broker's ledger has
given out, and says so (`rewind`), so that no question is trained on twice in the history that survives (I2).

    take(s) -> train -> publish version s + 1 -> commit(s) -> now and then: checkpoint, pin(s + 1)

Batch s + 1 is fetched and packed while s trains (`learner.feed`), weights travel while s + 1 trains
(`learner.push`), and what is said to the broker is delivered by another thread (`learner.link`): the loop below
waits for data and for nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from common import stacks
from common.accelerator import require_gpu
from common.errors import RunFailedError, UserError
from common.messages import Batch, Commit, Message, Pin, Rewind, Rewound, Welcome
from common.model_files import tokenizer_digest
from common.process import StopSignal
from common.recipe.schema import Recipe
from common.run_files import CHECKPOINTS_FOLDER
from common.systemd import Watchdog, notify_ready
from common.wire import PREDECESSOR_S, BrokerUnreachable, Client, RefusedError, hello
from learner.allocator import let_segments_grow
from learner.checkpoint import Checkpoints, Saved, free_bytes
from learner.engine import Engine
from learner.export import export_model
from learner.feed import Feed, Waiting
from learner.link import BrokerLink, RankLink
from learner.metrics import Clock, batch_metrics, finite, update_metrics
from learner.model import bytes_of_checkpoint, check_model, load_policy, load_reference, load_tokenizer
from learner.objective import objective_of
from learner.outcome import count_start, forget_starts, kept_outcome
from learner.prepare import Preparation, Work
from learner.probe import take_probe
from learner.push import WeightPush, route_of
from learner.ranks import launch_token, launched_rank, launched_world, leave_ranks, start_ranks
from learner.step import PolicyStep, StepResult

log = logging.getLogger("slipstream.learner")

PEER = "learner"
ATTEMPT_S = 5.0
DELIVER_S = 10.0  # to bring the ledger up to date before a checkpoint
LEAVE_S = 3.0
POLL_S = 0.2
SAVE_AGAIN_S = 30.0  # between attempts at the last checkpoint
NO_ROOM = "waiting for disk space"  # the state that `broker.explain` knows


class _Stopped(Exception):  # noqa: N818 - an order, not a defect
    """Told to stop before training began."""


def run_learner(address: str, *, resume: bool = False, keys: Path | None = None) -> int:
    """Be the learner, or one rank of it, of the run that the broker at `address` serves.

    Args:
        address: "host:port" of the broker; the recipe comes from it.
        resume: start from the newest checkpoint of the run folder, if there is one.
        keys: folder of CURVE keys; None on loopback.

    Returns:
        0 when the run is finished or was stopped in order, 1 when the last checkpoint could not be written.

    Raises:
        UserError: a setting of the recipe is wrong here. RunFailedError: what a restart does not cure.
    """
    stacks.arm()
    stop = StopSignal()  # asks for a checkpoint and an orderly end
    control, feed = _connection(address, keys), _connection(address, keys)
    try:
        welcome = _patiently(control, control.hello, stop)
        assert isinstance(welcome, Welcome)
        _stay_with(welcome.run, control, feed)
        folder = Path(welcome.folder)
        with kept_outcome(folder):
            recipe = Recipe.model_validate(welcome.recipe)
            _check_world(recipe)
            if launched_rank() > 0:
                RankLink(_observer(address, keys), welcome.heartbeat_s)
            else:
                count_start(folder, welcome.step, recipe.launch.restarts)
            learner = Learner(recipe, welcome, stop, control, feed)
            try:
                learner.start(resume)
            except _Stopped:
                learner.take_leave()
                forget_starts(folder)
                raise
            code = learner.run()
            if code == 0:
                forget_starts(folder)
            return code
    except _Stopped:
        log.info("stopped before training began")
        return 0


def _connection(address: str, keys: Path | None) -> Client:
    # One peer, several connections: the ranks are one learner to the broker, and their parent is its process.
    pid = os.getppid() if launched_world() > 1 else os.getpid()
    return Client(address, hello("learner", PEER, pid=pid, process=launch_token()), keys=keys)


def _stay_with(run: str, *clients: Client) -> None:
    """Join no other run: one may be served later where this one was."""
    for client in clients:
        client.hello = replace(client.hello, run=run)


def _observer(address: str, keys: Path | None) -> Client:
    return Client(address, hello("observer", f"{PEER}-rank-{launched_rank()}"), keys=keys)


def _patiently(client: Client, message: Message, stop: StopSignal) -> Message:
    """Send until answered, through outages of the broker and of its disk; a stop signal ends it.

    A learner before us may not be known to be gone yet: it is waited for as long as the broker may need to see that.
    """
    started = time.monotonic()
    while not stop.is_set():
        try:
            return client.request(message, timeout_s=ATTEMPT_S).message
        except BrokerUnreachable as error:
            log.warning("%s; still trying", error)
        except RefusedError as error:
            patience_s = max(PREDECESSOR_S, error.passes_s + 2 * ATTEMPT_S)
            waits = error.code == "not_now" and time.monotonic() - started < patience_s
            if error.code != "full" and not waits:
                raise RunFailedError(f"the broker refused the learner: {error}") from None
            log.warning("%s; still trying", error)
            time.sleep(1.0)
    raise _Stopped


def _check_world(recipe: Recipe) -> None:
    world = launched_world()
    if world != recipe.learner.ranks:
        raise UserError(
            f"the recipe wants {recipe.learner.ranks} ranks and {world} were started: use `slipstream learner "
            f"--ranks {recipe.learner.ranks}`, torchrun or srun.",
            setting="learner.ranks",
        )


class Learner:
    """One rank of the learner: `start`, then `run`."""

    def __init__(
        self, recipe: Recipe, welcome: Welcome, stop: StopSignal, control: Client, feed: Client
    ) -> None:
        self._recipe, self._welcome, self._stop = recipe, welcome, stop
        self._control, self._feed_client = control, feed
        self._clock = Clock()
        self._step = 0
        self._measured, self._trained = 0, 0
        self._link: BrokerLink | None = None

    # --- start ------------------------------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        """Load or restore everything, serve the first weights, and ask for the first batch."""
        recipe = self._recipe
        require_gpu(recipe.launch.device)
        shape, objective = check_model(recipe), objective_of(recipe)
        if route_of(recipe, on_gpu=True) != "ipc":
            let_segments_grow()
        self._ranks = start_ranks(recipe.learner.collective_timeout_s, recipe.learner.master_port)
        if self._ranks.leads:
            self._link = BrokerLink(self._control, self._welcome.heartbeat_s)
        self._tokenizer = self._same_tokenizer() if self._ranks.leads else None
        policy = load_policy(recipe, value_head=objective.needs_values)
        updates = recipe.run.steps * recipe.batch.optimizer_steps * recipe.algorithm.epochs
        self._engine = Engine(policy, recipe, self._ranks, updates)
        self._restore(resume)
        reference = load_reference(recipe, self._ranks.device) if objective.needs_reference else None
        self._objective = objective
        self._policy_step = PolicyStep(self._engine, objective, reference, lambda: self._be("training"))
        if self._told_to_stop():  # nothing is trained yet, and the broker may have left
            raise _Stopped
        self._serve()
        work = Preparation(recipe, objective, shape, self._ranks.rank, self._ranks.world, self._tokenizer)
        self._feed = Feed(
            self._feed_client, self._ranks, self._step, recipe.run.steps, work.wanted, work.prepare
        )

    def take_leave(self) -> None:
        """Say goodbye after a `start` that was stopped."""
        if self._link is not None:
            self._link.close("stopped before training began", LEAVE_S)

    def _same_tokenizer(self) -> Any:
        """The tokenizer, which the broker compares with that of the actors before anything is trained."""
        tokenizer = load_tokenizer(self._recipe)
        self._control.hello = replace(self._control.hello, tokenizer=tokenizer_digest(tokenizer))
        _patiently(self._control, self._control.hello, self._stop)
        return tokenizer

    def _restore(self, resume: bool) -> None:
        folder = Path(self._welcome.folder) / CHECKPOINTS_FOLDER
        self._checkpoints = Checkpoints(folder, self._recipe, self._ranks)
        saved = self._choose(resume) if self._ranks.leads else None
        step = int(self._ranks.broadcast(str(-1 if saved is None else saved.step).encode(), self._ranks.main))
        self._checkpoints.discard_after(max(step, 0))
        if step >= 0:
            self._step = self._checkpoints.load(self._engine, step)
            if self._ranks.leads:
                log.info("continuing from step %d", self._step)

    def _choose(self, resume: bool) -> Saved | None:
        checkpoints = self._checkpoints
        if not resume:
            if checkpoints.complete():
                raise UserError(
                    f"{checkpoints.folder} holds checkpoints: continue with --resume, or choose another name.",
                    setting="run.name",
                )
            checkpoints.folder.mkdir(parents=True, exist_ok=True)
            needed = bytes_of_checkpoint(self._engine.policy)
            if free_bytes(checkpoints.folder) < needed:
                raise UserError(
                    f"{checkpoints.folder} has less than the {needed >> 20} MiB free that one checkpoint takes.",
                    setting="run.root",
                )
            return None
        saved = checkpoints.to_resume(self._welcome.next_step)
        if saved is None:
            log.warning("there is no checkpoint: starting from the base model")
        return saved

    def _serve(self) -> None:
        """Say where we start, then serve that version: late joiners and restarted actors need it too."""
        self._push = WeightPush(self._recipe, self._ranks, self._welcome.run, Path(self._welcome.folder))
        self._push.publish(self._engine, self._step)
        if self._link is None:
            return
        rewound = _patiently(self._control, Rewind(step=self._step, version=self._step), self._stop)
        assert isinstance(rewound, Rewound)
        self._link.version = self._step
        self._link.meter(self._push.meters)
        self._link.follow_actors(self._push.keep_actors)
        self._link.serve(self._push.address(rewound.era))
        notify_ready(f"step {self._step}")
        Watchdog(partial(self._link.moves, self._recipe.broker.no_progress_s)).run()

    # --- the loop ---------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the last step or until told to stop; returns the exit code."""
        reason = "failed"
        try:
            reason = self._loop()
            saved = self._checkpoint()
            if reason == "finished":
                saved = saved or self._insist_on_a_checkpoint()
                reason = (
                    self._wait_for_the_end() if saved else "stopped: there is no checkpoint of the last step"
                )
            self._feed.close()
        except Exception as error:
            reason = f"failed: {error}"
            raise
        finally:
            delivered = self._link is None or self._link.close(reason[:1000], LEAVE_S)
            self._push.close()
        if not delivered:
            log.warning("the broker did not hear everything; it will when the run is resumed")
        self._engine.close()
        leave_ranks(self._ranks)
        return 0 if saved else 1

    def _loop(self) -> str:
        while self._step < self._recipe.run.steps:
            with self._clock("waiting"):
                item = self._feed.next()
            if self._told_to_stop():
                return "stopped"
            if isinstance(item, Waiting):
                self._be("waiting for groups", item.reason)
                continue
            self._train(item.batch, item.work)
            if (
                self._step % self._recipe.learner.checkpoint_every == 0
                and self._step < self._recipe.run.steps
            ):
                self._checkpoint()
        return "finished"

    def _told_to_stop(self) -> bool:
        link = self._link
        if link is not None:
            link.check()
        return self._ranks.any(self._stop.is_set() or (link is not None and link.command != "run"))

    def _be(self, state: str, waiting_for: str | None = None) -> None:
        if self._link is not None:
            self._link.be(state, waiting_for)

    def _train(self, batch: Batch, work: Work) -> None:
        self._be("training")
        with self._clock("training"):
            result = self._policy_step.run(work.updates, work.responses.rewards, work.first_pass)
        self._check_mismatch(result)
        self._be("publishing")
        self._step += 1
        with self._clock("publishing"):
            probe = take_probe(self._engine, work.updates[0][0].batch)
            self._push.publish(self._engine, self._step, probe)
        self._commit(batch, work, result)

    def _check_mismatch(self, result: StepResult) -> None:
        """I6: the same sums on every rank, so that all stop or none."""
        measured = result.mismatch.summary()
        self._trained += 1
        self._measured += bool(measured)
        mean, limit = measured.get("mismatch_mean", 0.0), self._recipe.max_mismatch
        if mean > limit:
            raise RunFailedError(
                f"step {self._step}: engine and learner disagree by {mean:.3g} nats per token at equal weights, more "
                f"than learner.max_mismatch = {limit:g}: the recorded log-probabilities are not those of the policy"
            )

    def _commit(self, batch: Batch, work: Work, result: StepResult) -> None:
        if self._link is None:
            self._clock.metrics(0)
            return
        metrics = batch_metrics(batch, work.responses, work.scheduled) | update_metrics(
            result, self._objective
        )
        metrics |= self._clock.metrics(work.trained_tokens) | self._push.meters()
        metrics["mismatch_measured_share"] = self._measured / self._trained
        metrics["checkpoint_failures"] = float(self._checkpoints.failures)
        metrics["invalid_responses"] = float(work.invalid)
        self._link.version = self._step
        self._link.post(
            Commit(step=batch.step, version=self._step, metrics=finite(metrics), samples=work.samples)
        )

    def _checkpoint(self) -> Saved | None:
        self._be("checkpointing")
        with self._clock("checkpointing"):
            # A broker that lost its history may not know of the steps of this one: then those before it must stay.
            told = self._link is not None and self._link.flush(DELIVER_S)
            saved = self._checkpoints.save(self._engine, self._step, self._export)
            if saved is not None and self._link is not None:
                log.info("checkpoint of step %d: %s", saved.step, saved.folder)
                self._link.post(Pin(step=saved.step, path=str(saved.folder)))
                self._link.ask_accuracy()
                if told:
                    self._checkpoints.prune(self._link.accuracy)
        return saved

    def _insist_on_a_checkpoint(self) -> Saved | None:
        """Try again until there is room: the last checkpoint is the run's model. None when a signal came first."""
        saved = None
        while saved is None and not self._ranks.any(self._stop.is_set()):
            self._be(NO_ROOM, f"room for the last checkpoint in {self._checkpoints.folder}")
            due = time.monotonic() + SAVE_AGAIN_S
            while not self._ranks.any(self._stop.is_set() or time.monotonic() >= due):
                if self._link is not None:
                    self._link.check()
                time.sleep(POLL_S)
            saved = self._checkpoint()
        return saved

    def _export(self, folder: Path) -> None:
        export_model(self._engine, self._push.whole_model(self._engine), self._tokenizer, folder)

    def _wait_for_the_end(self) -> str:
        """Serve the final weights until the last evaluation is in: the broker says when.

        It has its time from when it knows of the last step.
        """
        self._be("serving the final weights", "the end of the run")
        patience = self._recipe.broker.final_eval_s + self._recipe.broker.dead_after_s
        link, told, deadline = self._link, self._link is None, math.inf
        while not self._told_to_stop() and not self._ranks.any(time.monotonic() > deadline):
            if link is not None and not told and (told := link.flush(0.0)):
                deadline = time.monotonic() + patience
            time.sleep(POLL_S)
        return "finished"
