"""Ask a broker for its status, now or in the background.

Invariant: asking never disturbs the run: an observer leases nothing, takes nothing, and its absence is not noticed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.run_folder import is_served
from common.errors import SlipstreamError, UserError
from common.messages import Message, Status, StatusQuery, Stop
from common.wire import BrokerUnreachable, Client, RefusedError, hello
from deploy.folder import find_folder, newest_folder, read_address, read_recipe, resume_command

PERIOD_S = 1.0
ANSWER_S = 5.0
GONE_S = 1.0  # for a broker that probably is not there


def observer(address: str, keys: Path | None) -> Client:
    """A connection of a person, not of a worker."""
    name = f"observer-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return Client(address, hello("observer", name), keys=keys)


def ask(
    address: str,
    keys: Path | None,
    message: Message,
    timeout_s: float = ANSWER_S,
    setting: str | None = "--join",
) -> Message:
    """The broker's answer to one request of a person; `setting` is what named the broker.

    Raises:
        UserError: nobody answers there, or the broker refuses.
    """
    client = observer(address, keys)
    try:
        return client.request(message, timeout_s=timeout_s).message
    except BrokerUnreachable as error:
        raise UserError(f"{error}.", setting=setting) from None
    except RefusedError as error:
        raise UserError(f"the broker refused: {error}", setting=setting) from None
    finally:
        client.close()


@dataclass(frozen=True)
class Target:
    """The run that a person named, by its folder or by an address.

    Attributes:
        folder: None where an address was given.
        address: of its broker; None where the folder names none.
    """

    folder: Path | None
    address: str | None
    keys: Path | None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.folder.name if self.folder is not None else str(self.address)

    def ask(self, message: Message) -> Message:
        """See `ask`.

        Raises:
            UserError: also where nobody serves the run's folder.
        """
        if self.folder is None:
            return ask(str(self.address), self.keys, message)
        if self.address is None:
            raise not_running(self.folder)
        served = is_served(self.folder)  # false on a file system whose locks other hosts do not see, too
        try:
            timeout_s = ANSWER_S if served else GONE_S
            return ask(self.address, self.keys, message, timeout_s, setting=None)
        except UserError:
            if served:
                raise
            raise not_running(self.folder) from None

    def status(self, *, groups: bool = False) -> dict[str, Any]:
        """The status of the run; see `ask`."""
        reply = self.ask(StatusQuery(groups=groups))
        assert isinstance(reply, Status)
        return reply.status


def find_target(run: str | None, join: str | None, keys: Path | None) -> Target:
    """The run named by RUN or --join; without either the newest one.

    Raises:
        UserError: there is no such run.
    """
    if join is not None:
        return Target(None, join, keys)
    folder = find_folder(run) if run is not None else newest_folder()
    found = read_address(folder)
    return Target(folder, found["address"] if found else None, keys or read_recipe(folder).broker.keys)


def not_running(folder: Path) -> UserError:
    """What to say of a folder that nobody serves."""
    return UserError(f"'{folder}' is not running (it has no broker); go on with: {resume_command(folder)}")


def ask_status(
    address: str, keys: Path | None, *, groups: bool = False, timeout_s: float = ANSWER_S
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
        try:
            while not self._ending.wait(PERIOD_S):
                found = read_address(self._folder)
                if found is None:
                    continue
                if client is None or found["address"] != address:
                    if client is not None:
                        client.close()
                    address = found["address"]
                    client = observer(address, self._keys)
                self._look(client)
        finally:
            if client is not None:
                client.close()

    def _look(self, client: Client) -> None:
        try:
            reply = client.request(StatusQuery(), timeout_s=ANSWER_S).message
        except SlipstreamError:
            return
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
    try:
        ask(found["address"], keys, Stop(reason=reason), timeout_s)
    except SlipstreamError:
        return False
    return True
