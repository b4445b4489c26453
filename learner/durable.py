"""Whether the files of a checkpoint are whole, and how they get to the disk for good.

Invariant: looks only; what is done about a damaged file is the caller's business (`learner.checkpoint`).
torch's files are zip archives: their directory stands at the end, and each part has a checksum.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path


def cut_short(folder: Path) -> str | None:
    """What is wrong with torch's files as far as their ends show, which a crash may have cut off; else None."""
    for path in sorted(folder.rglob("*.pt")):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    return None


def damage_of(folder: Path) -> str | None:
    """What is wrong with torch's files, all bytes read; None when they are whole."""
    if (short := cut_short(folder)) is not None:
        return short
    for path in sorted(folder.rglob("*.pt")):
        try:
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    return f"{path.name}: {part} is damaged"
        except (OSError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
