"""TCP ports of this machine.

Invariant: a port that is handed out was free a moment ago; whoever binds it must still cope with one that no longer is.
"""

from __future__ import annotations

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host`, one of our addresses, that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
