"""A real Slurm on loopback: one munged, one slurmctld, a few slurmd, all of this test's own.

Invariant: nothing of it touches a Slurm that the machine may have (its own configuration, socket, key, ports and
spool), and everything that it started is gone when the block ends.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.scripted.wait import until

SEARCH = os.environ["PATH"] + ":/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "scontrol", "srun")

GPUS = 4  # that each node claims to have: plain files, which Slurm complains of in its log, and counts

# cgroups need a system manager: process tracking by parentage is enough for workers that end with their group.
CONFIGURATION = """\
ClusterName=slipstream-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=15
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=small Nodes=n1 MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


wait_until = partial(until, every=0.2)  # each look is a process of Slurm's


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """A running Slurm; `conf` is its configuration file."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        ports = _free_ports(nodes + 1)
        lines = [
            f"NodeName=n{i} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={ports[i]} "
            f"CPUs={cpus} RealMemory=4000 Gres=gpu:{GPUS}"
            for i in range(1, nodes + 1)
        ]
        text = CONFIGURATION.format(
            host=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            ports=ports,
            folder=folder,
            nodes="\n".join(lines),
        )
        self.conf.write_text(text)
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "state").mkdir()

    def start(self) -> None:
        """Start munged, slurmctld and the nodes; returns when all nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *paths)
        wait_until((self.folder / "munge.socket").exists, "munged listens", 10)
        self._start("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.conf))
        for i in range(1, self.nodes + 1):
            self.start_node(f"n{i}")
        wait_until(self._all_idle, "all nodes are idle", 30)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def _start(self, label: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCH)
        assert path is not None
        with (self.folder / f"{label}.out").open("ab") as log:
            self.daemons[label] = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SLURM_CONF": str(self.conf)},
                start_new_session=True,
            )

    def _all_idle(self) -> bool:
        answer = self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        return answer.split() == ["idle"] * self.nodes

    def ask(self, *command: str) -> str:
        """Run a client command; returns its output, empty when it failed."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=30, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def requeue(self, label: str) -> None:
        """Lose a job without warning, as in preemption or a node's failure, and let it start again at once."""
        self.ask("scontrol", "requeue", label)
        self.start_again(label)

    def start_again(self, label: str) -> None:
        """Slurm lets a requeued job wait for two minutes, to be sure that nothing of it is left: be faster."""
        wait_until(lambda: "PENDING" in self._state(label), f"job {label} is back in the queue", 60)
        time.sleep(3.0)  # a late word of its old script would be taken for the new one's
        self.ask("scontrol", "update", f"JobId={label}", "StartTime=now")

    def _state(self, label: str) -> str:
        return self.ask("squeue", "--noheader", f"--jobs={label}", "--format=%T")

    def stop(self) -> None:
        """Cancel all jobs, then end every daemon."""
        self.ask("scancel", "--me", "--signal=KILL", "--full")
        self.ask("scancel", "--me")
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.ask("squeue", "--noheader"), "all jobs are gone", 30)
        for daemon in reversed(self.daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait(5)


@contextlib.contextmanager
def running_cluster(nodes: int = 3, cpus: int = 8) -> Iterator[Cluster]:
    """A cluster of `nodes` nodes with `cpus` claimed cores each (they share this machine's)."""
    # Not pytest's folder: munge's socket path must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
