"""The broker process: check, claim, bind, announce, serve, leave.

Invariant: whatever the user got wrong is known before the socket is bound and nothing is written to a run that
another broker serves.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from broker.fitness import check_bind, check_questions
from broker.journal import Journal
from broker.metrics_page import MetricsPage
from broker.recording import open_recording
from broker.run_folder import Claim, was_served
from broker.server import Server, open_socket
from broker.service import Service
from broker.state import RunState, load_held_out, load_training_set, rules_of
from broker.status import snapshot
from broker.store import MemoryStore
from common import stacks
from common.errors import EXIT_RESTART, UserError
from common.keys import apply_server
from common.messages import EvalQuestion
from common.process import StopSignal
from common.recipe.schema import Recipe
from common.run_files import JOURNAL_FOLDER
from common.systemd import notify_ready

log = logging.getLogger("slipstream.broker")

LAST_WORDS_S = 0.3  # for those that asked last to read the reply


def serve(
    recipe: Recipe,
    *,
    run_folder: Path,
    resume: bool = False,
    replay: Path | None = None,
    stop_event: threading.Event | None = None,
) -> int:
    """Serve a run until it has ended; returns the exit code: 0 when it is finished or was stopped.

    An interrupted broker returns 3 (`EXIT_RESTART`): the others wait for it, the run goes on.

    Args:
        recipe: resolved, with `run.name` set.
        run_folder: the run's folder; made if absent.
        resume: continue the run in that folder, if a broker has served it before.
        replay: folder of a recorded run whose steps are served again, to a learner alone (`broker.recording`);
            `recipe` must have its questions and batch.
        stop_event: leave at once when set; by default when SIGTERM or SIGINT comes.

    Raises:
        UserError: keys, port, folder or question sets are not usable; names the setting.
    """
    stacks.arm()
    check_bind(recipe)
    if resume and recipe.broker.durability == "memory" and was_served(run_folder):
        raise UserError("'memory' keeps nothing that --resume could continue.", setting="broker.durability")
    stop = stop_event or StopSignal()
    questions = load_training_set(recipe)
    held_out = load_held_out(recipe) if replay is None else []
    check_questions(recipe, len(questions))
    claim = Claim(run_folder, resume=resume)
    context = zmq.Context()
    page = MetricsPage(recipe.broker.metrics_port)
    authenticator = socket = None
    try:
        if replay is not None:
            state = open_replay(recipe, run_folder, questions, replay)
        else:
            state = open_run(recipe, run_folder, questions, held_out)
        socket = open_socket(context, recipe.broker.max_message_mb)
        if recipe.broker.keys is not None:
            authenticator = apply_server(socket, recipe.broker.keys, context)
        address = bind(socket, recipe)
        claim.announce(address=address, run=recipe.run.name, metrics_port=page.port)
        log.info("run '%s': broker at %s, step %d", recipe.run.name, address, state.ledger.step)
        notify_ready(f"run '{recipe.run.name}' at {address}")
        return _serve(state, socket, stop, page)
    finally:
        if socket is not None:
            # Before the authenticator: a handshake that waits for it would block the end.
            socket.close(linger=0)
        if authenticator is not None:
            authenticator.stop()
        context.destroy(linger=0)
        page.close()
        claim.release()


def open_run(
    recipe: Recipe, folder: Path, questions: Sequence[dict[str, Any]], held_out: Sequence[EvalQuestion]
) -> RunState:
    """The state of the run in `folder`: restored from its journal, or new.

    Raises:
        UserError: the journal belongs to a run with other questions, seed or batch.
    """
    if recipe.broker.durability == "memory":
        return RunState(recipe, folder, questions, held_out, MemoryStore())
    journal = Journal(folder / JOURNAL_FOLDER, fsync=recipe.broker.fsync, record=recipe.broker.record)
    journal.identify(identity(recipe, questions))
    ledger = journal.load(rules_of(recipe, len(questions)))
    state = RunState(recipe, folder, questions, held_out, journal, ledger)
    if ledger is not None:
        now = time.monotonic()
        ledger.restart_clocks(now)
        state.restore(journal.meta("extra"), now)
    return state


def open_replay(
    recipe: Recipe, folder: Path, questions: Sequence[dict[str, Any]], recorded: Path
) -> RunState:
    """A run that serves the steps of a recorded one again; see `broker.recording`."""
    ledger, store = open_recording(recorded, rules_of(recipe, len(questions)))
    return RunState(recipe, folder, questions, [], store, ledger)


def identity(recipe: Recipe, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings that may not change within a run: they say which question is which, and what a step is."""
    digest = hashlib.sha256(json.dumps([[row["problem"], str(row["answer"])] for row in questions]).encode())
    return {
        "run.seed": recipe.run.seed,
        "data.train": f"{len(questions)} questions, sha256 {digest.hexdigest()[:16]}",
        "batch.questions_per_step": recipe.batch.questions_per_step,
        "rollout.group_size": recipe.rollout.group_size,
    }


def _serve(state: RunState, socket: Any, stop: threading.Event | StopSignal, page: MetricsPage) -> int:
    service = Service(state)
    _collect_rarely()
    state.spool.append("run", state.ledger.step, {"recipe": state.recipe.model_dump(mode="json")})
    try:
        why = Server(socket, service, stop, page).run()
    finally:
        state.store.close()
    if why == "interrupted":
        log.info("the broker leaves: interrupted; the others wait for it to come back with --resume")
        return EXIT_RESTART
    outcome = "finished" if state.ledger.finished else "stopped"
    final = snapshot(state, service.ending, None, time.monotonic())
    state.spool.append("end", state.ledger.step, {"status": outcome, "reason": why, "final": final})
    log.info("the broker leaves: %s", why)
    # A peer's socket forgets what it has received and not read when the connection ends (ZMQ_IMMEDIATE).
    time.sleep(LAST_WORDS_S)
    return 0


def _collect_rarely() -> None:
    """Groups are kept by the thousand and are no cycles: to look for some in all of them cost a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def bind(socket: Any, recipe: Recipe) -> str:
    """Bind to the recipe's address; returns "host:port".

    Raises:
        UserError: the port is in use or the address is not this host's.
    """
    host, port = recipe.broker.bind, recipe.broker.port
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise UserError(
                f"port {port} is in use; take another, or 0 for a free one.", setting="broker.port"
            ) from None
        raise UserError(f"cannot bind to '{host}': {error.strerror}.", setting="broker.bind") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
