"""One group whole: question, responses, verdicts, versions, log-probabilities.

Invariant: shown as recorded; only decoding tokens to text is added, where the model's tokenizer is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.messages import GroupHeader, GroupId, GroupQuery, GroupView
from common.wire import RefusedError, Reply
from deploy.watch import observer


def show_group(console: Any, address: str, keys: Path | None, name: str) -> None:
    """Print the group "epoch:index" of the run behind `address`."""
    from rich.table import Table

    client = observer(address, keys)
    try:
        welcome = client.connect(5.0)
        reply = client.request(GroupQuery(group=_parse(name)), timeout_s=10.0)
    except RefusedError as error:
        raise UserError(f"{error}", setting="--group") from None
    finally:
        client.close()
    view = reply.message
    assert isinstance(view, GroupView)
    console.print(f"group {name}: {view.state}", highlight=False)
    console.print_json(json.dumps(view.question, default=str))
    if view.header is None or not reply.payload:
        console.print("its responses are not kept any more, or not there yet")
        return
    table = Table("verdict", "reward", "tokens", "finish", "versions (tokens)", "mean log-prob", "response")
    for row in _responses(view.header, reply, _decoder(welcome.recipe["model"]["path"])):
        table.add_row(*row)
    console.print(table)


def _parse(name: str) -> GroupId:
    epoch, colon, index = name.partition(":")
    if not colon or not (epoch.isdigit() and index.isdigit()):
        raise UserError(f"'{name}' is not of the form EPOCH:INDEX.", setting="--group")
    return GroupId(int(epoch), int(index))


def _responses(header: GroupHeader, reply: Reply, decode: Any) -> list[tuple[str, ...]]:
    ids = np.frombuffer(reply.payload[1], np.int32)
    logps = np.frombuffer(reply.payload[2], np.float32)
    rows: list[tuple[str, ...]] = []
    start = 0
    for response in header.responses:
        part = slice(start, start + response.tokens)
        start += response.tokens
        versions = ", ".join(f"{version} ({count})" for version, count in response.versions)
        rows.append(
            (
                response.verdict,
                f"{response.reward:g}",
                str(response.tokens),
                response.finish,
                versions,
                f"{logps[part].mean():.3f}",
                decode(ids[part].tolist()),
            )
        )
    return rows


def _decoder(path: str) -> Any:
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return lambda ids: " ".join(map(str, ids))
    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
