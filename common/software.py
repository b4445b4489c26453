"""Which software a peer is, and whether two may meet in one run.

Invariant: every peer names itself by `software_version`, so that the broker compares like with like.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "slipstream-rl"


def software_version() -> str:
    """Version of this installation, or "0" when it runs from a checkout that is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "0"


def compatible(one: str, other: str) -> bool:
    """Whether two versions may meet: the same major version, and before 1.0 the same minor one too.

    A checkout that is not installed calls itself "0", and meets any 0.x.
    """
    ours, theirs = one.split("."), other.split(".")
    depth = 2 if ours[0] == "0" and "0" not in (one, other) else 1
    return ours[:depth] == theirs[:depth]
