"""Small files that several processes read.

Invariant: a reader finds the old content or the new one, never a part of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_json(path: Path, value: Any, *, indent: int | None = None, durable: bool = False) -> None:
    """Put `value` as JSON in the place of whatever `path` holds.

    Args:
        value: plain values.
        indent: as in `json.dumps`.
        durable: return only when the content would survive a power cut.

    Raises:
        OSError: the old content is still there.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
