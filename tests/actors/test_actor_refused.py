"""An actor that the broker will not have: whether a fresh process would fare better."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import main
from common.errors import EXIT_RESTART, RunFailedError
from common.messages import Hello, Message, Refused
from common.recipe.digest import sampling_digest
from common.wire import RefusedError
from tests.scripted.broker import scripted_recipe


def test_a_changed_recipe_asks_for_a_fresh_process_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = scripted_recipe(tmp_path)
    said: list[Hello] = []

    class Wire:
        def __init__(self, address: str, hello: Hello, keys: Path | None) -> None:
            said.append(hello)

        async def connect(self, timeout_s: float | None) -> Message:
            raise RefusedError(Refused(code=code, reason="why"))

        async def request(self, message: Message, timeout_s: float) -> Message:
            raise RefusedError(Refused(code="unknown_peer", reason="say Hello first"))

        def close(self) -> None:
            pass

    class Engine:
        tokenizer = None

        def __init__(self, **arguments: object) -> None:
            pass

        async def warm_up(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    welcome = SimpleNamespace(recipe=recipe.model_dump(mode="json"))
    for name, stub in {
        "_introduce": lambda *parts: welcome,
        "require_gpu_build": lambda device: None,
        "require_tokenizer": lambda path: None,
        "engine_arguments": lambda *parts: {},
        "tokenizer_digest": lambda tokenizer: "digest",
        "AsyncClient": Wire,
        "Engine": Engine,
    }.items():
        monkeypatch.setattr(main, name, stub)
    code = "changed"
    assert main.run_actor("there:1", name="a") == EXIT_RESTART
    assert said[0].sampling == sampling_digest(recipe)
    code = "incompatible"
    with pytest.raises(RunFailedError, match="the broker refused actor a: why"):
        main.run_actor("there:1", name="a")
