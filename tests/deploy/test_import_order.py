"""What takes seconds to import is imported when it is known to be needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing either fails
from deploy.cli import main
main(["pretrain", "pretrain-minimath-base", "--set", "train.steps=abc"])
"""


def test_a_wrong_setting_of_pretraining_is_said_before_torch_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.startswith("error: train.steps: ")) == (2, True), done.stderr
