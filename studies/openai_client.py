"""A client of OpenAI-compatible servers: completions for models under analysis, chat for judges.

Invariant: a server that does not answer, or answers something else, ends as one sentence that names the address;
passing trouble (no connection, overload) is tried again a few times first.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from common.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 600.0
PATIENCE_S = (0.5, 2.0, 8.0)
REQUESTS_AT_ONCE = 16
_PASSING = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")
R = TypeVar("R")


class OpenAIClient:
    """One server.

    Args:
        url: its address, with or without `/v1` at the end.
        model: name of the model there.
        setting: what to name in errors.
        patience: seconds between attempts.
    """

    def __init__(
        self, url: str, model: str, *, setting: str = "--endpoint", patience: tuple[float, ...] = PATIENCE_S
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model, self._setting, self._patience = model, setting, patience

    def complete(self, prompt: str, samples: int, **sampling: Any) -> list[Mapping[str, Any]]:
        """`samples` completions of a raw prompt; each has `text` and `finish_reason`."""
        body = {"prompt": prompt, "n": samples, **sampling}
        return self._choices("completions", body, lambda choice: choice["text"] is not None)

    def chat(self, message: str, *, max_tokens: int) -> str:
        """The reply to one user message, at temperature 0."""
        body = {
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        choices = self._choices("chat/completions", body, lambda choice: choice["message"]["content"])
        return str(choices[0]["message"]["content"])

    def _choices(self, path: str, body: Mapping[str, Any], check: Callable[[Any], Any]) -> list[Any]:
        reply = self._post(path, {"model": self._model, **body})
        try:
            choices = reply["choices"]
            for choice in choices:
                check(choice)
        except (KeyError, TypeError) as error:
            raise self._error(f"answered without {error}") from error
        if not choices:
            raise self._error("answered with nothing")
        return choices

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._base}/{path}", json.dumps(body).encode(), headers)
        for pause in (*self._patience, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING or pause is None:
                    raise self._error(f"refused with HTTP {error.code}") from error
            except ValueError as error:
                raise self._error("answered something that is not JSON") from error
            except OSError as error:
                if pause is None:
                    raise self._error(f"cannot be reached ({error})") from error
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _error(self, what: str) -> UserError:
        return UserError(f"the server at {self._base} {what}", setting=self._setting)


def at_once(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of each item, some requests in flight at one time, results in order."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))
