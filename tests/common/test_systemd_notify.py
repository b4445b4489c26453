"""sd_notify against a real datagram socket: what systemd would read, byte for byte."""

from __future__ import annotations

import os
import socket

import pytest

from common.systemd import Progress, Watchdog, notify_ready, watchdog_interval_s


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """systemd's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def received(listener: socket.socket) -> list[str]:
    """Everything that waits in the socket now."""
    listener.setblocking(False)
    texts = []
    while True:
        try:
            texts.append(listener.recv(4096).decode())
        except BlockingIOError:
            return texts


def test_ready_reaches_the_manager(manager):
    notify_ready("step 0, 12 actors")
    assert received(manager) == ["READY=1\nSTATUS=step 0, 12 actors"]


def test_abstract_socket_names_work(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"slipstream-test-notify-{os.getpid()}"
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify_ready()
        assert received(listener) == ["READY=1"]


def test_nothing_happens_outside_systemd(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    notify_ready()
    asked = []
    assert not Watchdog(lambda: asked.append(1) or True).beat()
    assert watchdog_interval_s() is None
    assert not asked


@pytest.mark.parametrize("text", ["", "0", "-5", "soon"])
def test_no_watchdog_without_an_interval(manager, monkeypatch, text):
    monkeypatch.setenv("WATCHDOG_USEC", text)
    assert not Watchdog().beat()
    assert received(manager) == []


def test_a_worker_without_progress_falls_silent(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "1")  # every beat is due
    progress = iter([True, False, True])
    watchdog = Watchdog(lambda: next(progress))
    assert [watchdog.beat() for _ in range(3)] == [True, False, True]
    assert received(manager) == ["WATCHDOG=1"] * 2


def test_pings_are_not_sent_before_they_are_due(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", str(3600 * 10**6))
    watchdog = Watchdog()
    assert [watchdog.beat() for _ in range(3)] == [True, False, False]


def test_the_thread_beats_until_stopped(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    watchdog = Watchdog()
    watchdog.run()
    assert [manager.recv(64) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    watchdog.stop()


def test_progress_is_change_or_a_reason_to_wait(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("common.systemd.time.monotonic", lambda: now[0])
    progress = Progress(10.0)
    seen = []
    for second, mark, waiting in (
        (5, 1, False),
        (14, 1, False),
        (16, 1, False),
        (17, 1, True),
        (28, 2, False),
    ):
        now[0] = float(second)
        progress.note(mark, waiting=waiting)
        seen.append(progress())
    assert seen == [True, True, False, True, True]
