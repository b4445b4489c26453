"""A run under a real systemd user instance: started, killed, hung, refused, stopped, continued.

python systemd_scenario.py RUN_FOLDER UNITS_FOLDER [demo]     (inside tests/deploy/user_manager.sh)

With `demo` the workers are the real ones: they start, are watched closely for a while, and stop.

Prints what was seen as JSON; the test judges.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

HOST = socket.gethostname()
WORKERS = ("slipstream-broker", "slipstream-learner", "slipstream-actor@0", "slipstream-actor@1")
DEMO_WORKERS = WORKERS[:3]


def systemctl(*arguments: str) -> str:
    """Output of systemctl --user."""
    done = subprocess.run(["systemctl", "--user", *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def show(unit: str, key: str) -> str:
    """A property of a unit."""
    return systemctl("show", f"{unit}.service", f"--property={key}", "--value").strip()


def wait(condition: Callable[[], object], seconds: float = 40.0) -> bool:
    """Wait for a condition; whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def seen(folder: Path, who: str, what: str) -> list[dict]:
    """Notes of a worker (tests/slurm/program.py)."""
    try:
        lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    except OSError:
        return []
    return [line for line in lines if (line["who"], line["what"]) == (who, what)]


def running(pids: list[int]) -> list[int]:
    """Those processes that still run."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def states(units: tuple[str, ...] = WORKERS) -> dict[str, str]:
    """State of each worker's unit, and of one that failed the reason."""
    found = {unit: show(unit, "ActiveState") for unit in units}
    reasons = ("Result", "ExecMainCode", "ExecMainStatus")
    return {
        unit: state if state != "failed" else " ".join([state, *(show(unit, reason) for reason in reasons)])
        for unit, state in found.items()
    }


def main(folder: Path, units: Path) -> dict[str, object]:
    """Play it; returns what was seen."""
    install(units, "WatchdogSec=6\nRestartSec=100ms\n", "slipstream-actor@")
    systemctl("start", "slipstream.target")
    wait(lambda: set(states().values()) == {"active"})
    facts: dict[str, object] = {"started": states()}
    return (
        facts
        | killed(folder)
        | interrupted()
        | hung(folder)
        | refused(units)
        | stopped(folder)
        | finished(folder)
    )


def install(units: Path, settings: str, *names: str) -> None:
    """Link the units, and change settings of some of them by drop-in files."""
    systemctl("link", *map(str, [*units.glob("*.service"), *units.glob("*.target")]))
    for name in names:
        file = Path(os.environ["XDG_CONFIG_HOME"]) / f"systemd/user/{name}.service.d/test.conf"
        file.parent.mkdir(parents=True)
        file.write_text(f"[Service]\n{settings}")
    systemctl("daemon-reload")


def demo(folder: Path, units: Path) -> dict[str, object]:
    """The real workers: ready, alive under a watchdog of seconds, and gone without a trace."""
    names = ("slipstream-broker", "slipstream-learner", "slipstream-actor@")
    install(units, f"WatchdogSec=20\nStandardError=append:{folder}/workers.log\n", *names)
    systemctl("start", "slipstream.target")
    wait(lambda: list(states(DEMO_WORKERS).values()) == ["active"] * 3, 300)
    facts: dict[str, object] = {"started": states(DEMO_WORKERS)}
    wait(lambda: trained(folder) > 2, 120)
    time.sleep(45)  # more than two intervals of the watchdog
    facts["restarts"] = [show(unit, "NRestarts") for unit in DEMO_WORKERS]
    facts["steps"] = trained(folder)
    systemctl("stop", "slipstream.target")
    wait(lambda: set(states(DEMO_WORKERS).values()) == {"inactive"}, 90)
    facts["stopped"] = states(DEMO_WORKERS)
    facts["checkpoints"] = len(list((folder / "checkpoints").iterdir()))
    lines = [" ".join(process.cmdline()) or process.name() for process in psutil.process_iter()]
    ours = [line for line in lines if str(folder) in line and Path(__file__).name not in line]
    facts["survivors"] = ours + [line for line in lines if "VLLM" in line]
    return facts


def trained(folder: Path) -> int:
    """Steps in metrics.jsonl."""
    try:
        return (folder / "metrics.jsonl").read_text().count('"kind": "learner"')
    except OSError:
        return 0


def killed(folder: Path) -> dict[str, object]:
    """kill -9 of an actor: it comes back, and its engine is not left behind."""
    engine = seen(folder, f"{HOST}-0", "started")[-1]["engine"]
    before = show("slipstream-actor@0", "MainPID")
    os.kill(int(before), signal.SIGKILL)
    back = wait(lambda: show("slipstream-actor@0", "MainPID") not in (before, "0"))
    wait(lambda: len(seen(folder, f"{HOST}-0", "started")) == 2)
    return {"back_after_kill": back, "engine_after_kill": running([engine])}


def interrupted() -> dict[str, object]:
    """SIGTERM to the broker alone: the run is not over, so it comes back, and that is no failure."""
    before = show("slipstream-broker", "MainPID")
    os.kill(int(before), signal.SIGTERM)
    back = wait(lambda: show("slipstream-broker", "MainPID") not in (before, "0"))
    wait(lambda: show("slipstream-broker", "ActiveState") == "active")
    return {"back_after_interruption": back}


def hung(folder: Path) -> dict[str, object]:
    """An actor without progress: the watchdog ends it, and it comes back."""
    file = folder / f"hang-{HOST}-1"
    file.touch()
    noticed = wait(lambda: int(show("slipstream-actor@1", "NRestarts")) > 0)
    file.unlink()
    wait(lambda: len(seen(folder, f"{HOST}-1", "started")) >= 2)
    return {"restarted_after_hang": noticed, "untouched_meanwhile": show("slipstream-learner", "NRestarts")}


def refused(units: Path) -> dict[str, object]:
    """Exit code 2, the caller's mistake: no second try."""
    (units / "slipstream-actor-5.env").write_text("TEST_EXIT=2\n")
    systemctl("start", "slipstream-actor@5.service")
    wait(lambda: show("slipstream-actor@5", "ActiveState") == "failed")
    time.sleep(1.0)
    return {name: show("slipstream-actor@5", name) for name in ("ActiveState", "NRestarts", "ExecMainStatus")}


def stopped(folder: Path) -> dict[str, object]:
    """systemctl stop: everyone leaves in order, nothing survives."""
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    pids = [line["pid"] for line in lines] + [line["engine"] for line in lines if "engine" in line]
    systemctl("stop", "slipstream.target")
    wait(lambda: "active" not in states().values() and "deactivating" not in states().values(), 60)
    left = [bool(seen(folder, who, "left")) for who in ("learner", f"{HOST}-0", f"{HOST}-1")]
    return {"stopped": states(), "survivors": running(pids), "left_in_order": left}


def finished(folder: Path) -> dict[str, object]:
    """Started again, the run goes on to its end, and nothing restarts after that."""
    systemctl("start", "slipstream.target")
    wait(lambda: '"kind": "end"' in (folder / "metrics.jsonl").read_text(), 120)
    wait(lambda: set(states().values()) == {"inactive"}, 60)
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [point["values"] for point in points if point["kind"] == "end"]
    history = json.loads((folder / "checkpoint.json").read_text())
    return {
        "finished": states(),
        "outcomes": [end["status"] for end in ends],
        "sum_ok": [bool(end["final"]["ledger"]["sum_ok"]) for end in ends],
        "steps": len(history),
        "questions": len({key for groups in history for key in groups}),
    }


if __name__ == "__main__":
    play = demo if sys.argv[3:] == ["demo"] else main
    print(json.dumps(play(Path(sys.argv[1]), Path(sys.argv[2]))))
