"""CURVE keys on real sockets: who has them gets in, who has not does not, and what is wrong is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from typer.testing import CliRunner

from common.errors import UserError
from common.keys import apply_client, apply_server, make_keys, public_keys
from deploy.keys import keys


@contextmanager
def echo_server(folder: Path) -> Iterator[tuple[zmq.Context, zmq.Socket, str]]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    authenticator = apply_server(socket, folder, context)
    socket.bind("tcp://127.0.0.1:*")
    try:
        yield context, socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)
    finally:
        socket.close(linger=0)
        authenticator.stop()
        context.destroy(linger=0)


def send(context: zmq.Context, server: zmq.Socket, address: str, folder: Path | None, wait_ms: int) -> bool:
    """Whether a message of a client with the keys in `folder` arrives."""
    with context.socket(zmq.DEALER) as client:
        client.linger = 0
        if folder is not None:
            apply_client(client, folder)
        client.connect(address)
        client.send(b"hello")
        return bool(server.poll(wait_ms))


def test_the_holder_of_the_keys_gets_in(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    with echo_server(tmp_path / "keys") as (context, server, address):
        assert send(context, server, address, tmp_path / "keys", 5000)


def test_without_keys_nothing_arrives(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    with echo_server(tmp_path / "keys") as (context, server, address):
        assert not send(context, server, address, None, 300)


def test_a_client_that_was_not_admitted_stays_out(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "stranger")
    (tmp_path / "stranger" / "server.key").write_text((tmp_path / "keys" / "server.key").read_text())
    with echo_server(tmp_path / "keys") as (context, server, address):
        assert not send(context, server, address, tmp_path / "stranger", 300)


def test_a_client_does_not_talk_to_another_broker(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "impostor")
    (tmp_path / "impostor" / "clients" / "client.key").write_text(
        (tmp_path / "keys" / "client.key").read_text()
    )
    with echo_server(tmp_path / "impostor") as (context, server, address):
        assert not send(context, server, address, tmp_path / "keys", 300)


def test_secrets_are_private_and_checked(tmp_path: Path) -> None:
    make_keys(tmp_path)
    secret = tmp_path / "client.key_secret"
    assert secret.stat().st_mode & 0o077 == 0
    secret.chmod(0o644)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        refused = pytest.raises(UserError, match=r"broker\.keys: .*can be read by others: chmod 600")
        with refused:
            apply_client(socket, tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"server\.key' does not exist; `slipstream keys init`"):
        public_keys(tmp_path)
    (tmp_path / "server.key").write_text("nonsense")
    with pytest.raises(UserError, match="cannot be read as a key"):
        public_keys(tmp_path)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path)
    before = public_keys(tmp_path)
    with pytest.raises(UserError, match="holds keys already"):
        make_keys(tmp_path)
    assert public_keys(tmp_path) == before


def test_the_verb_makes_and_shows(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert CliRunner().invoke(keys, ["init", str(folder)]).exit_code == 0
    shown = CliRunner().invoke(keys, ["show", str(folder)]).output
    assert public_keys(folder)["server"][:20] in shown
    assert "clients/client" in shown


def test_a_key_that_looks_like_markup_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "m[sHQt^/Q0@+]c2<=bold>[/]kD[red]Xa1:b:c0"
    monkeypatch.setattr("common.keys.public_keys", lambda folder: {"server": key})
    assert key in CliRunner().invoke(keys, ["show", str(tmp_path)]).output
