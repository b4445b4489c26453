"""How to start `slipstream` again: as a worker, from a batch file or from a unit.

Invariant: nothing that lies in the working directory changes what is started; `python -m deploy` would take a
`deploy.py` there for this package.
"""

from __future__ import annotations

import sys
from pathlib import Path


def own_program() -> tuple[str, ...]:
    """Argument vector of `slipstream` of this installation, with absolute paths."""
    script = Path(sys.executable).parent / "slipstream"
    # Without the script nothing is installed: the working directory is where the packages are.
    return (str(script),) if script.is_file() else (sys.executable, "-m", "deploy")
