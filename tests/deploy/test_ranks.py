"""Several ranks under the real torchrun: their exit code, signals to them, and nobody who is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.run_files import OUTCOME_FILE
from learner.outcome import kept_outcome, read_outcome
from tests.scripted.wait import until

REPOSITORY = Path(__file__).resolve().parents[2]
PARENT = (
    "import sys; from pathlib import Path; from deploy.launch.ranks import run_ranks\n"
    "sys.exit(run_ranks(2, [sys.executable, *sys.argv[1:4]], Path(sys.argv[3])))\n"
)
# What a rank does by way of example; it "imports" for a while before it listens to signals, as a real one does.
RANK = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from common.errors import RunFailedError, report
from common.process import die_with_parent
from learner.outcome import kept_outcome

die_with_parent()
mode, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
(folder / f"started-{{rank}}").touch()
if mode == "mismatch":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends rank 0 when rank 1 has failed
    if rank == "1":
        try:
            with kept_outcome(folder):
                raise RunFailedError("the engines disagree")
        except RunFailedError as error:
            sys.exit(report(error))
elif mode == "crash":
    raise ValueError("boom")
else:
    time.sleep(1.5)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    while not told:
        time.sleep(0.05)
    time.sleep(0.5)
    (folder / f"saved-{{rank}}").touch()
    sys.exit(0)
time.sleep(60)
"""


def start(folder: Path, mode: str) -> subprocess.Popen:
    script = folder / "rank.py"
    script.write_text(RANK.format(repository=str(REPOSITORY)))
    line = [sys.executable, "-c", PARENT, str(script), mode, str(folder)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(line, cwd=REPOSITORY, stdout=log, stderr=log)


def until_started(folder: Path) -> None:
    until(lambda: all((folder / f"started-{rank}").exists() for rank in range(2)), (folder / "log").read_text)


@pytest.mark.parametrize(("mode", "code"), [("mismatch", 4), ("crash", 1)])
def test_the_code_is_that_of_the_rank_that_failed(tmp_path: Path, mode: str, code: int) -> None:
    (tmp_path / OUTCOME_FILE).write_text("2\n")  # of an earlier start
    assert start(tmp_path, mode).wait(120.0) == code, (tmp_path / "log").read_text()
    assert read_outcome(tmp_path) == (4 if mode == "mismatch" else None)


def test_sigterm_reaches_ranks_that_do_not_listen_yet_and_all_end_in_order(tmp_path: Path) -> None:
    parent = start(tmp_path, "train")
    until_started(tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(120.0) == 0, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_nobody_outlives_the_parent(tmp_path: Path) -> None:
    parent = start(tmp_path, "train")
    until_started(tmp_path)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 3, "torchrun and two ranks"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=60.0)
    assert not alive


def test_what_a_restart_may_cure_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), kept_outcome(tmp_path):
        raise ValueError("boom")
    assert read_outcome(tmp_path) is None
