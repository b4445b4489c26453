"""Who watches a run leaves no connection behind: not when the broker moves, not at the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.files import replace_json
from common.messages import Status
from common.run_files import ADDRESS_FILE
from deploy import watch
from tests.scripted.wait import until


class FakeClient:
    def __init__(self, address: str) -> None:
        self.address, self.closed = address, False

    def request(self, _message: object, timeout_s: float) -> SimpleNamespace:
        assert timeout_s == watch.ANSWER_S
        return SimpleNamespace(message=Status(status={"at": self.address}))

    def close(self) -> None:
        self.closed = True


def test_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeClient] = []

    def observer(address: str, _keys: Path | None) -> FakeClient:
        made.append(FakeClient(address))
        return made[-1]

    monkeypatch.setattr(watch, "observer", observer)
    monkeypatch.setattr(watch, "PERIOD_S", 0.01)
    watcher = watch.Watcher(tmp_path, None)
    watcher.start()
    for address in ("a:1", "b:2"):
        replace_json(tmp_path / ADDRESS_FILE, {"address": address})
        until(lambda address=address: watcher.latest == {"at": address})
    assert [client.closed for client in made] == [True, False]
    watcher.stop()
    watcher.join(10.0)
    assert [client.closed for client in made] == [True, True]
