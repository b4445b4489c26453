"""Whether the files of a checkpoint are whole.

Invariant: looks only; what is done about a damaged file is the caller's business (`learner.checkpoint`). A file that
cannot be read just now (`OSError`: a disk or a mount that fails) is not called damaged: nothing is known of it.
torch's files are zip archives: their directory stands at the end, and each part has a checksum.
"""

from __future__ import annotations

import zipfile
from pathlib import Path


def cut_short(folder: Path) -> str | None:
    """What is wrong with torch's files as far as their ends show, which a crash may have cut off; else None.

    Raises:
        OSError: one cannot be read.
    """
    for path in sorted(folder.rglob("*.pt")):
        if _damage(path, whole=False) is not None:
            return f"{path.name} is cut short"
    return None


def damage_of(folder: Path) -> str | None:
    """What is wrong with torch's files, all bytes read; None when they are whole. Raises OSError as `cut_short`."""
    if (short := cut_short(folder)) is not None:
        return short
    for path in sorted(folder.rglob("*.pt")):
        if (damage := _damage(path, whole=True)) is not None:
            return f"{path.name}: {damage}"
    return None


def _damage(path: Path, *, whole: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip() if whole else None
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):  # zipfile says so of an end that it could not read
            raise error.__context__ from None
        return str(error)
    return None if part is None else f"{part} is damaged"
