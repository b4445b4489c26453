"""The relay tree, as properties and by exact enumeration of small cases."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.weights import Endpoint, plan_tree

links = st.lists(st.integers(0, 5), max_size=40).map(
    lambda nodes: [Endpoint(f"l{i}", f"n{node}") for i, node in enumerate(nodes)]
)


@given(links, st.integers(1, 5))
def test_every_link_hangs_on_the_learner_through_links_planned_before(endpoints, degree):
    plan = plan_tree(endpoints, degree)
    assert plan.keys() == {e.name for e in endpoints}
    seen: set[str | None] = {None}
    for name, parent in plan.items():
        assert parent in seen
        seen.add(name)


@given(links, st.integers(1, 5))
def test_degrees_hold_and_each_node_is_entered_once(endpoints, degree):
    plan = plan_tree(endpoints, degree)
    node_of = {e.name: e.node for e in endpoints}
    entered = Counter(node_of[n] for n, p in plan.items() if p is None or node_of[p] != node_of[n])
    assert all(entered[node] == 1 for node in set(node_of.values()))
    local = Counter(p for n, p in plan.items() if p is not None and node_of[p] == node_of[n])
    remote = Counter(p for n, p in plan.items() if p is None or node_of[p] != node_of[n])
    assert max([0, *local.values()]) <= degree
    assert max([0, *remote.values()]) <= degree


@pytest.mark.parametrize(
    ("count", "degree", "depth"), [(1, 1, 1), (4, 1, 4), (6, 2, 2), (14, 2, 3), (84, 4, 3)]
)
def test_depth_of_complete_trees(count, degree, depth):
    plan = plan_tree([Endpoint(str(i), str(i)) for i in range(count)], degree)
    depths: dict[str | None, int] = {None: 0}
    for name, parent in plan.items():
        depths[name] = depths[parent] + 1
    assert max(depths.values()) == depth


def test_two_nodes_of_three_by_hand():
    endpoints = [Endpoint(f"{node}{i}", node) for node in "ab" for i in range(3)]
    assert plan_tree(endpoints, 1) == {"a0": None, "b0": "a0", "a1": "a0", "a2": "a1", "b1": "b0", "b2": "b1"}


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match=r"weights\.degree"):
        plan_tree([], 0)
    with pytest.raises(ValueError, match="same name"):
        plan_tree([Endpoint("a", "x"), Endpoint("a", "y")], 2)
