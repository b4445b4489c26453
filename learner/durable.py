"""Whether the files of a checkpoint are whole.

Invariant: looks only; what is done about a damaged file is the caller's business (`learner.checkpoint`).
torch's files are zip archives: their directory stands at the end, and each part has a checksum.
"""

from __future__ import annotations

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
