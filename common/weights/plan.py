"""Who passes weights to whom: a relay tree over the registered links.

Invariant: the plan is a pure function of the links and the degree; every link appears once, has one parent
(the learner or another link), and no cycle exists. A node is entered from outside once: its first link (the
head) receives over the network and the others on the node receive from it or from one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LEARNER: None = None  # the parent of the links that the learner serves itself


@dataclass(frozen=True)
class Endpoint:
    """One receiver: the link's name and the node (host) that it runs on."""

    name: str
    node: str


def plan_tree(links: Sequence[Endpoint], degree: int, roots: int | None = None) -> dict[str, str | None]:
    """Parent of each link; `LEARNER` (None) for those served by the learner.

    The learner serves at most `roots` links (default: `degree`). A link serves at most `degree` heads of other nodes and at most
    `degree` links of its own node (the two do not share a network card). Depth grows as log_degree of the
    number of nodes plus log_degree of the links per node. Parents precede children in the result, and order
    within `links` is kept: earlier links (the longest connected) come nearer to the learner.

    Raises:
        ValueError: `degree` or `roots` is below 1, or a name appears twice.
    """
    if degree < 1:
        raise ValueError(f"weights.degree must be at least 1, not {degree}")
    roots = degree if roots is None else roots
    if roots < 1:
        raise ValueError("the learner must serve at least one link")
    if len({link.name for link in links}) != len(links):
        raise ValueError("two links have the same name")
    by_node: dict[str, list[str]] = {}
    for link in links:
        by_node.setdefault(link.node, []).append(link.name)
    parents = _fill([names[0] for names in by_node.values()], LEARNER, roots, degree)
    for head, *others in by_node.values():
        parents |= _fill(others, head, degree, degree)
    return parents


def _fill(names: Sequence[str], root: str | None, slots: int, degree: int) -> dict[str, str | None]:
    """Breadth-first tree: `slots` children below `root` (not in the result), `degree` below each other."""
    parents: dict[str, str | None] = {}
    free: deque[str | None] = deque([root] * slots)
    for name in names:
        parents[name] = free.popleft()
        free.extend([name] * degree)
    return parents
