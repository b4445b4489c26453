"""Ports on which a test lets something listen later."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port of loopback that the kernel gives to nobody else while the block lasts.

    It is bound and not listened on: whoever asks for it by number and reuses addresses, as all servers here do, gets
    it, as often as it likes; meanwhile connections to it are refused.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
