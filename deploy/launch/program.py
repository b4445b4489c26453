"""How to start `slipstream` again from a batch file or a unit."""

from __future__ import annotations

import sys
from pathlib import Path


def own_program() -> tuple[str, ...]:
    """Argument vector of `slipstream` of this installation, with absolute paths."""
    script = Path(sys.executable).parent / "slipstream"
    return (str(script),) if script.is_file() else (sys.executable, "-m", "deploy")
