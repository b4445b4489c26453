"""Who waits for whom: one sentence per cause, from a status snapshot alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from broker.explain import duration, explain

NOW = 1_700_000_000.0


def peer(role: str, **more: Any) -> dict[str, Any]:
    """A living peer in good health."""
    healthy = {"role": role, "alive": True, "farewell": "", "state": "working", "last_seen_s": 0.5}
    return healthy | {"waiting_for": None, "waiting_s": 0.0, "version": 7, "era": 1} | more


HEALTHY: dict[str, Any] = {
    "time": NOW,
    "started": NOW - 1000.0,
    "last_commit_time": NOW - 100.0,
    "finished": False,
    "evaluation_open": False,
    "evaluation": None,
    "ending": None,
    "disk_full": None,
    "version": 7,
    "era": 1,
    "peers": {
        "actor-0": peer("actor"),
        "actor-1": peer("actor"),
        "learner": peer("learner", state="training"),
    },
    "waits": [],
    "train": {"checkpoint_failures": 0.0},
    "pinned": None,
    "leases": {"count": 12},
    "rates": {"actor_tokens_per_s": 1234.5},
    "no_progress": {"stalled": False, "seconds": 1.0, "stacks": None},
}
GONE = {"alive": False, "farewell": "dead: not heard of for 30 s", "state": "gone", "last_seen_s": 90.0}


def status(**changes: Any) -> dict[str, Any]:
    """A healthy run with changes; `peers` are merged by name, None removes one."""
    found = copy.deepcopy(HEALTHY)
    for name, change in changes.pop("peers", {}).items():
        if change is None:
            del found["peers"][name]
        else:
            found["peers"][name] = found["peers"].get(name, {}) | change
    return found | changes


def said(**changes: Any) -> list[str]:
    """What is said of such a run."""
    return [str(cause) for cause in explain(status(**changes))]


def test_nothing_is_said_of_a_healthy_run() -> None:
    assert said() == []


def test_slow_actors() -> None:
    wait = {"who": "learner", "for": "actor-0, actor-1", "seconds": 42.0, "groups_missing": 5}
    assert said(waits=[wait]) == [
        "the learner waits for actor-0, actor-1: 5 groups are missing, 12 in flight, actors make 1,234 tokens/s (42 s)"
    ]


def test_checkpoints_that_cannot_be_written() -> None:
    failing = {"train": {"checkpoint_failures": 2.0}, "pinned": {"step": 4, "path": "x"}}
    assert said(**failing) == [
        "checkpoints cannot be written (2 in a row): free some space; a learner that dies goes back to step 4"
    ]
    room = {"state": "waiting for disk space", "waiting_for": "room for the last checkpoint in /run"}
    for evaluation_open in (True, False):
        assert said(
            **failing,
            finished=True,
            evaluation_open=evaluation_open,
            peers={"learner": room | {"waiting_s": 61.0}},
        ) == [
            "the learner waits for room for the last checkpoint in /run: free some space, and the run ends by itself "
            "(1 min 1 s)"
        ]


def test_a_wait_that_belongs_to_every_step_is_not_said() -> None:
    wait = {"who": "learner", "for": "actor-0", "seconds": 1.0, "groups_missing": 5}
    assert said(waits=[wait]) == []


def test_slow_learner() -> None:
    full = "broker: the buffer is full (24 groups in flight or buffered): waiting for learner learner"
    waiting = {"waiting_for": full, "waiting_s": 130.0, "state": "waiting"}
    (sentence,) = said(peers={"actor-0": waiting, "actor-1": waiting | {"waiting_s": 12.0}})
    assert sentence == f"actor-0, actor-1: {full} (learner is training) (2 min 10 s)"


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ({"actor-0": None, "actor-1": None}, "no actor has joined: the learner waits for one (16 min 40 s)"),
        (
            {"actor-0": GONE, "actor-1": GONE},
            "every actor is gone (actor-0, actor-1): the learner waits for one",
        ),
        ({"actor-1": GONE}, "actor-1 lost: its questions went to others (1 min 30 s)"),
        ({"learner": None}, "no learner has joined: actors go on until the buffer is full"),
        ({"learner": GONE}, "the learner is gone: actors go on until the buffer is full (1 min 30 s)"),
        (
            {"actor-0": {"last_seen_s": 20.0}},
            "no sign of life from actor-0: paused, frozen or cut off (20 s)",
        ),
        ({"actor-1": {"state": "draining"}}, "actor-1 told to leave: finishing what is in hand"),
        (
            {"actor-0": {"version": 6}},
            "version 7 has not reached actor-0: the weight push is stuck or slow (1 min 40 s)",
        ),
        ({"actor-0": {"era": 0, "version": 9}}, "version 7 has not reached actor-0"),
    ],
)
def test_peers(peers: dict, words: str) -> None:
    (sentence,) = said(peers=peers)
    assert sentence.startswith(words)


def test_an_actor_that_left_in_order_is_not_lost() -> None:
    assert said(peers={"actor-1": GONE | {"farewell": "left: leaving"}}) == []


def test_weights_on_their_way_are_not_stuck() -> None:
    assert said(peers={"actor-0": {"version": 6}}, last_commit_time=NOW - 3.0) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk_full": "the broker's disk is full, nothing is taken in: x"}, "the broker's disk is full"),
        (
            {"ending": "stopped by the user"},
            "the run ends: stopped by the user; waiting for actor-0, actor-1, learner",
        ),
        (
            {"evaluation": {"version": 7, "actor": None, "seconds": 30.0}},
            "the evaluation of version 7 waits for an actor with that version (30 s)",
        ),
        (
            {
                "finished": True,
                "evaluation_open": True,
                "evaluation": {"version": 7, "actor": "actor-1", "seconds": 65.0},
            },
            "the last evaluation (version 7) is with actor-1 (1 min 5 s)",
        ),
        (
            {"no_progress": {"stalled": True, "seconds": 660.0, "stacks": "runs/x/stacks/20260101-*.txt"}},
            "no progress: no version, no group, no evaluation; stacks: runs/x/stacks/20260101-*.txt (11 min 0 s)",
        ),
        (
            {"peers": {"learner": {"waiting_for": "the end of the run", "waiting_s": 4.0}}},
            "learner waits for the end of the run (4 s)",
        ),
    ],
)
def test_the_run(changes: dict, words: str) -> None:
    (sentence,) = said(**changes)
    assert sentence.startswith(words)


def test_an_evaluation_beside_training_holds_nobody_up() -> None:
    assert said(evaluation={"version": 7, "actor": "actor-1", "seconds": 65.0}) == []


def test_a_finished_run_needs_no_explanation() -> None:
    assert said(finished=True, peers={"actor-0": None, "actor-1": None, "learner": None}) == []


def test_the_cause_comes_before_its_consequences() -> None:
    wait = {"who": "learner", "for": "an actor to lease questions", "seconds": 90.0, "groups_missing": 4}
    sentences = said(disk_full="the disk is full", waits=[wait], peers={"actor-0": GONE})
    assert [sentence.split()[0] for sentence in sentences] == ["the", "actor-0", "the"]
    assert sentences[0].startswith("the disk is full")


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 7500)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
