"""CURVE keys of a run: ZeroMQ's own encryption and authentication (RFC 26), both ways.

Invariant (I8): with keys, a connection is encrypted, the client knows that it talks to the broker whose public key
it has, and the broker admits only clients whose public key lies in `clients/`. Secret files are readable by their
owner alone; a folder where others can read them is refused.

    FOLDER/server.key          public key of the broker: every node needs it
    FOLDER/server.key_secret   the broker's host only
    FOLDER/client.key_secret   every node that runs an actor, the learner or `status`
    FOLDER/clients/*.key       public keys that the broker admits
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from common.errors import UserError

SETTING = "broker.keys"
SERVER, CLIENT, ADMITTED = "server", "client", "clients"


def make_keys(folder: Path) -> None:
    """Write a new set of keys.

    Raises:
        UserError: the folder holds keys already, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(folder.glob("*.key_secret")):
            raise UserError(f"'{folder}' holds keys already; they are never overwritten.", setting=SETTING)
        (folder / ADMITTED).mkdir(exist_ok=True, mode=0o700)
        for name in (SERVER, CLIENT):
            _, secret = zmq.auth.create_certificates(folder, name)
            Path(secret).chmod(0o600)
        public = (folder / f"{CLIENT}.key").read_text(encoding="utf-8")
        (folder / ADMITTED / f"{CLIENT}.key").write_text(public, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write keys to '{folder}': {error.strerror}.", setting=SETTING) from None


def public_keys(folder: Path) -> dict[str, str]:
    """The public keys in a folder by name: the server's, and those of admitted clients (Z85 text)."""
    keys = {SERVER: _public(folder / f"{SERVER}.key")}
    for path in sorted((folder / ADMITTED).glob("*.key")):
        keys[f"{ADMITTED}/{path.stem}"] = _public(path)
    return keys


def apply_client(socket: Any, folder: Path) -> None:
    """Make `socket` an authenticated client; before `connect`.

    Raises:
        UserError: a key is missing, unreadable, or readable by others.
    """
    server = _public(folder / f"{SERVER}.key")
    public, secret = _pair(folder, CLIENT)
    socket.curve_publickey, socket.curve_secretkey = public.encode(), secret.encode()
    socket.curve_serverkey = server.encode()


def apply_server(socket: Any, folder: Path, context: zmq.Context) -> ThreadAuthenticator:
    """Make `socket` an authenticated server; before `bind`. Stop the returned authenticator after closing it.

    Raises:
        UserError: a key is missing, unreadable, or readable by others; no client would be admitted.
    """
    public, secret = _pair(folder, SERVER)
    if not any((folder / ADMITTED).glob("*.key")):
        raise UserError(f"'{folder / ADMITTED}' holds no public key: nobody could join.", setting=SETTING)
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain="*", location=str(folder / ADMITTED))
    socket.curve_publickey, socket.curve_secretkey = public.encode(), secret.encode()
    socket.curve_server = True
    return authenticator


def check_server(folder: Path) -> None:
    """Raise UserError unless `folder` has what a broker needs."""
    _pair(folder, SERVER)


def check_client(folder: Path) -> None:
    """Raise UserError unless `folder` has what a broker's peers need."""
    _public(folder / f"{SERVER}.key")
    _pair(folder, CLIENT)


def _public(path: Path) -> str:
    return _load(path)[0].decode()


def _pair(folder: Path, name: str) -> tuple[str, str]:
    path = folder / f"{name}.key_secret"
    public, secret = _load(path)
    if secret is None:
        raise UserError(f"'{path}' holds no secret key.", setting=SETTING)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"'{path}' can be read by others: chmod 600 it.", setting=SETTING)
    return public.decode(), secret.decode()


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        what = "does not exist" if not path.exists() else f"cannot be read as a key ({error})"
        raise UserError(f"'{path}' {what}; `slipstream keys init` makes keys.", setting=SETTING) from None
