"""How far a run's points have come on their way to MLflow: `tracking.json` in the run folder.

Invariant: written whole or not at all, by the tracker alone. Everybody else only reads it, beside the spool, and
can so say what MLflow does not have yet without asking MLflow or the tracker.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from common.files import replace_json
from common.run_files import SPOOL
from common.tracking.spool import read_spool

FILE = "tracking.json"
ERROR_LENGTH = 300
COUNTED_BYTES = 4 << 20  # the broker counts whenever it is asked for its status


@dataclass
class Delivery:
    """What the tracker remembers.

    Attributes:
        token: names the run for MLflow, so that a run whose creation was never answered is found again.
        mlflow_run: id of the MLflow run; None until there is one.
        offset: bytes of the spool that were delivered.
        uri: MLflow store.
        url: where to look at the run; None until there is one, and where the store is a database without a server.
        error: why MLflow does not take anything at present; None when it does.
    """

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    mlflow_run: str | None = None
    offset: int = 0
    uri: str = ""
    url: str | None = None
    error: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Delivery:
        """As saved, or the beginning."""
        try:
            saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**{name: saved[name] for name in cls.__dataclass_fields__ if name in saved})
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, folder: Path) -> None:
        """Write it down."""
        replace_json(folder / FILE, asdict(self))


def tracking_view(folder: Path, now: float | None = None) -> dict[str, Any] | None:
    """What `status` shows of the delivery; None for a run that is not tracked, or not yet.

    Returns:
        `uri`, `run` (id) and `url` (without passwords), `points_behind` (lines of the spool that MLflow does not have,
        as many as `COUNTED_BYTES` hold), `seconds_behind` (age of the oldest of them) and `error`.
    """
    if not (folder / FILE).exists():
        return None
    delivery = Delivery.load(folder)
    oldest = next(read_spool(folder / SPOOL, delivery.offset), None)
    return {
        "uri": without_password(delivery.uri),
        "run": delivery.mlflow_run,
        "url": delivery.url,
        "points_behind": 0 if oldest is None else _lines(folder / SPOOL, delivery.offset),
        "seconds_behind": 0.0 if oldest is None else max(0.0, (now or time.time()) - oldest.time),
        "error": delivery.error,
    }


def _lines(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(COUNTED_BYTES).count(b"\n")


def without_password(uri: str) -> str:
    """A URI that may be shown."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _reason(error: BaseException) -> BaseException | None:
    """What urllib3 and requests keep beside the chain of causes."""
    inside = getattr(error, "reason", None) or next(iter(error.args), None)
    return inside if isinstance(inside, BaseException) else None


def one_line(error: BaseException) -> str:
    """The root of an error in one line, for people: HTTP libraries wrap a refused connection five times."""
    while (inner := error.__cause__ or error.__context__ or _reason(error)) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:ERROR_LENGTH]
