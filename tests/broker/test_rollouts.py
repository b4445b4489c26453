"""Figures over all published groups: equal to a plain calculation, whatever becomes of the groups."""

from __future__ import annotations

import time
from statistics import mean
from typing import NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.members import Peer
from broker.points import PEERS_SHOWN, fleet_point, system_point
from broker.profile import Profile
from broker.rollouts import Rollouts
from common.tracking.catalogue import entry_of, full_name

VERDICTS = ("correct", "wrong", "unformatted", "truncated", "unverified")


class Made(NamedTuple):
    """A response."""

    tokens: int
    reward: float
    verdict: str


responses = st.builds(Made, st.integers(1, 2000), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(VERDICTS))
groups = st.lists(st.tuples(st.lists(responses, min_size=1, max_size=8), st.integers(0, 9)), max_size=12)


def profile(group: list[Made]) -> Profile:
    """What the broker reads of such a group."""
    lengths, rewards, verdicts = (list(values) for values in zip(*group, strict=True))
    return Profile(lengths, rewards, verdicts, {0: sum(lengths)}, sum(lengths))


def plain_calculation(published: list[tuple[list[Made], int]]) -> dict[str, float]:
    """The same figures, from lists."""
    everything = [response for group, _ in published for response in group]
    if not everything:
        return {"groups": 0, "responses": 0}
    correct = [r for r in everything if r.verdict == "correct"]
    others = [r for r in everything if r.verdict != "correct"]
    figures = {
        "groups": len(published),
        "responses": len(everything),
        "reward": mean(r.reward for r in everything),
        "accuracy": len(correct) / len(everything),
        "format_share": mean(r.verdict in ("correct", "wrong") for r in everything),
        "truncated": mean(r.verdict == "truncated" for r in everything),
        "unverified": mean(r.verdict == "unverified" for r in everything),
        "length": mean(r.tokens for r in everything),
        "length_max": max(r.tokens for r in everything),
        "groups_all_correct": mean(all(r.verdict == "correct" for r in group) for group, _ in published),
        "groups_all_wrong": mean(all(r.verdict != "correct" for r in group) for group, _ in published),
        "groups_equal_reward": mean(len({r.reward for r in group}) == 1 for group, _ in published),
        "staleness": mean(lag for _, lag in published),
    }
    figures |= {"length_correct": mean(r.tokens for r in correct)} if correct else {}
    return figures | ({"length_incorrect": mean(r.tokens for r in others)} if others else {})


@given(published=groups, cut=st.integers(0, 12))
def test_a_window_is_the_plain_calculation_also_over_a_restart(published, cut: int) -> None:
    rollouts = Rollouts()
    for number, (group, lag) in enumerate(published):
        if number == cut:  # the broker is started again from its journal
            saved = msgpack.unpackb(msgpack.packb(rollouts.state()))
            rollouts = Rollouts()
            rollouts.restore(saved)
        rollouts.add(profile(group), lag)
    assert rollouts.close_window() == pytest.approx(plain_calculation(published))
    assert rollouts.close_window() == {"groups": 0.0, "responses": 0.0}, "each group counts once"


def test_every_figure_is_in_the_catalogue() -> None:
    rollouts = Rollouts()
    rollouts.add(profile([Made(3, 1.0, "correct"), Made(5, 0.0, "wrong")]), 1)
    assert all(entry_of(full_name("actor", name)) for name in rollouts.close_window())


def an_actor(name: str, version: int, **telemetry: float) -> Peer:
    peer = Peer(name, "actor", "host", 1, "0", joined=time.time(), seen=0.0, version=version)
    peer.telemetry = telemetry
    return peer


def test_actors_together_and_one_by_one() -> None:
    actors = [
        an_actor("a", 5, cpu_cores=1.0, gpu0_use=0.5, gpu1_use=1.0, kv_use=0.2, groups_accepted=7.0),
        an_actor("b c", 3, cpu_cores=2.0, gpu0_use=0.0),
        an_actor("d", 5),
    ]
    actors[1].waiting_for = "broker"
    point = fleet_point(actors, 5, now=0.0)
    assert (point["count"], point["waiting"], point["cpu_cores"], point["kv_use"]) == (3, 1, 3.0, 0.2)
    assert (point["gpu_use"], point["versions_behind"], point["versions_behind_max"]) == (
        0.5,
        pytest.approx(2 / 3),
        2,
    )
    assert "gpu_memory_share" not in point, "what nobody measured is left out"
    assert all(entry_of(full_name("actor", name)) for name in point)
    system = system_point(actors)
    assert system == {
        "a/cpu_cores": 1.0,
        "a/gpu0_use": 0.5,
        "a/gpu1_use": 1.0,
        "b_c/cpu_cores": 2.0,
        "b_c/gpu0_use": 0.0,
    }
    assert all(entry_of(full_name("system", name)) for name in system)


def test_a_thousand_actors_do_not_make_a_thousand_series() -> None:
    actors = [an_actor(f"a{n}", 1, cpu_cores=1.0) for n in range(1000)]
    assert len(system_point(actors)) == PEERS_SHOWN
    assert fleet_point(actors, 1, now=0.0)["cpu_cores"] == 1000
