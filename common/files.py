"""Small files that several processes read, and how files get to the disk for good.

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
        to_disk(temporary)
    os.replace(temporary, path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
