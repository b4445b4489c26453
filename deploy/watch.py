"""Ask a broker for its status, now or in the background.

Invariant: asking never disturbs the run: an observer leases nothing, takes nothing, and its absence is not noticed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from common.errors import SlipstreamError, UserError
from common.messages import Hello, Message, Status, StatusQuery, Stop
from common.software import software_version
from common.wire import BrokerUnreachable, Client, RefusedError
from deploy.folder import read_address

PERIOD_S = 1.0


def observer(address: str, keys: Path | None) -> Client:
    """A connection of a person, not of a worker."""
    name = f"observer-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    hello = Hello(
        role="observer",
        peer=name,
        software=software_version(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    return Client(address, hello, keys=keys)


def ask(address: str, keys: Path | None, message: Message, timeout_s: float = 5.0) -> Message:
    """The broker's answer to one request of a person.

    Raises:
        UserError: nobody answers there, or the broker refuses.
    """
    client = observer(address, keys)
    try:
        return client.request(message, timeout_s=timeout_s).message
    except BrokerUnreachable as error:
        raise UserError(f"{error}.", setting="--join") from None
    except RefusedError as error:
        raise UserError(f"the broker refused: {error}", setting="--join") from None
    finally:
        client.close()


def ask_status(
    address: str, keys: Path | None, *, groups: bool = False, timeout_s: float = 5.0
) -> dict[str, Any]:
    """The status of the run behind `address`; see `ask`."""
    reply = ask(address, keys, StatusQuery(groups=groups), timeout_s)
    assert isinstance(reply, Status)
    return reply.status


class Watcher(threading.Thread):
    """Keeps `latest` at most a second or two old, whatever the broker does."""

    def __init__(self, folder: Path, keys: Path | None) -> None:
        super().__init__(name="status-watcher", daemon=True)
        self.latest: dict[str, Any] | None = None
        self.answered: float | None = None  # when, on the monotonic clock
        self._folder, self._keys = folder, keys
        self._ending = threading.Event()

    def run(self) -> None:
        client: Client | None = None
        address = None
        while not self._ending.wait(PERIOD_S):
            found = read_address(self._folder)
            if found is None:
                continue
            if client is None or found["address"] != address:
                address = found["address"]
                client = observer(address, self._keys)
            try:
                reply = client.request(StatusQuery(), timeout_s=5.0).message
            except SlipstreamError:
                continue
            if isinstance(reply, Status):
                self.latest, self.answered = reply.status, time.monotonic()

    def stop(self) -> None:
        """End the thread at its next turn."""
        self._ending.set()


def ask_to_stop(folder: Path, keys: Path | None, reason: str, timeout_s: float = 2.0) -> bool:
    """Ask the broker of a run folder to end the run in order; False when it does not answer."""
    found = read_address(folder)
    if found is None:
        return False
    client = observer(found["address"], keys)
    try:
        client.request(Stop(reason=reason), timeout_s=timeout_s)
        return True
    except SlipstreamError:
        return False
    finally:
        client.close()
