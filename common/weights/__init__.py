"""Weights from the learner to running receivers: snapshots, links, relay tree, four routes.

The learner makes a `Publisher` and hands its `address` to the broker; a receiver opens a `LinkClient`, and a
`Stager` in each of its workers. See docs/weights.md.
"""

from common.weights.client import LinkClient
from common.weights.errors import Cause, LinkError, SupersededError
from common.weights.layout import Manifest, TensorSpec
from common.weights.plan import Endpoint, plan_tree
from common.weights.publisher import Publisher
from common.weights.snapshot import Snapshot, SnapshotBuilder
from common.weights.stager import Staged, Stager
from common.weights.store import Address

__all__ = [
    "Address",
    "Cause",
    "Endpoint",
    "LinkClient",
    "LinkError",
    "Manifest",
    "Publisher",
    "Snapshot",
    "SnapshotBuilder",
    "Staged",
    "Stager",
    "SupersededError",
    "TensorSpec",
    "plan_tree",
]
