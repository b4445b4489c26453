"""The data-parallel ranks of the learner: who we are, how we agree, how we leave.

Invariant: every wait for another rank has a deadline, no object is pickled between ranks, and with one rank
nothing here costs a system call. Two gloo groups carry control: `main` for the training loop and `feed` for the
thread that fetches the next batch, so that neither can disturb the other's order of collectives. Gradients go
through DeepSpeed's own groups (gloo on CPU, NCCL on GPU).
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from common.errors import UserError
from common.ports import free_port
from common.process import die_with_parent
from learner.allocator import keep_freed_memory

log = logging.getLogger("slipstream.learner")

# What tells one start of several ranks from another, and is the same in all of them.
_STARTED = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_world() -> int:
    """Ranks that torchrun or srun started us among; 1 when we were started alone."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Our rank, before any process group exists."""
    launched_world()
    return int(os.environ.get("RANK", "0"))


def launch_token() -> str:
    """Names this start of the learner, the same in all of its ranks; empty for one rank, which is a process."""
    if launched_world() == 1:
        return ""
    said = "/".join(os.environ.get(name, "") for name in _STARTED)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _alone(master_port: int) -> Mapping[str, str]:
    port = master_port or free_port()
    return dict(zip(_LAUNCHED, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))


def load_deepspeed() -> Any:
    """Import DeepSpeed without building any of its extensions and without what we never use of it.

    Left out, it saves seconds of every start: its shared-memory collective (only for inference) would be compiled
    by the first start on CPU, its autotuner imports mlflow, and its Muon optimizer wraps functions in
    torch.compile when ZeRO is set up, which loads the whole compiler. Said again at each call: another library may
    have imported it first (accelerate does, to save a model), and then the collective would be compiled after all.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import; must not be set on GPU nodes
    # torch announces the next names of collectives at each use of today's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _hidden("mlflow"):
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.compiler

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.runtime.compiler.compile = _left_uncompiled
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let an optional `package` look absent, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        yield
    finally:
        del sys.modules[package]


def _left_uncompiled(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """In place of DeepSpeed's decorator `compile()`."""
    return lambda function: function


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the data-parallel ranks.

    Attributes:
        rank, world: our number and how many we are.
        device: where the model lives.
        main, feed: gloo groups of the training loop and of the feed thread; None with one rank.
    """

    rank: int
    world: int
    device: torch.device
    main: Any = None
    feed: Any = None

    @property
    def leads(self) -> bool:
        """True on rank 0, which talks to the broker for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, ReduceOp.SUM, group=self.main)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum of a CPU tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, ReduceOp.MAX, group=self.main)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        return bool(self.max(torch.tensor([int(flag)])).item())

    def gather(self, values: Tensor) -> list[Tensor]:
        """The 1-D CPU tensors of all ranks, in rank order; their lengths may differ."""
        if self.world == 1:
            return [values]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(values)]), group=self.main)
        padded = values.new_zeros(max(int(length) for length in lengths))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.main)
        return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    def broadcast(self, frame: bytes | None, group: Any) -> bytes:
        """The bytes that rank 0 hands in, on every rank; `group` is `main` or `feed`. Others' bytes are ignored."""
        if self.world == 1:
            assert frame is not None
            return frame
        sent = bytearray(frame or b"") if self.leads else bytearray()
        size = torch.tensor([len(sent)])
        dist.broadcast(size, src=0, group=group)
        data = torch.empty(int(size), dtype=torch.uint8)
        if sent:
            data = torch.frombuffer(sent, dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, src=0, group=group)
        return data.numpy().tobytes()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


def start_ranks(timeout_s: float, master_port: int = 0) -> Ranks:
    """Join the other ranks; with no launcher's environment, be the only one.

    Args:
        timeout_s: deadline of every wait for another rank, seconds.
        master_port: rendezvous port when started alone; 0 picks a free one.

    Raises:
        UserError: the environment names several ranks but not where they meet, or this rank sees no GPU of its own.
    """
    alone = launched_world() == 1
    if not alone:
        die_with_parent()  # a killed torchrun leaves no orphans
        missing = [name for name in _LAUNCHED if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment of rank {os.environ['RANK']} lacks {', '.join(missing)}: "
                "start the ranks with torchrun.",
                setting="learner.ranks",
            )
    deepspeed = load_deepspeed()  # seconds, after which a port that was free before may be taken
    if alone:
        os.environ.update(_alone(master_port))
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = _device(local)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False)
    if world == 1:
        return Ranks(rank, world, device)
    main, feed = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Ranks(rank, world, device, main, feed)


def _device(local: int) -> torch.device:
    """The GPU of the `local`-th rank of this host, made current; the processor where there is none."""
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if local >= seen:
        # With a GPU bound to each rank this one would be cuda:0, but NCCL often cannot reach its neighbours' then.
        raise UserError(
            f"rank {local} of this host sees {seen} GPU{'s' * (seen > 1)}: every rank must see those of all ranks of its "
            "host (srun: --gpus-per-node and --gpu-bind=none, not --gpus-per-task), or there are too few for so many.",
            setting="learner.ranks",
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def bound_all_groups(timeout_s: float) -> None:
    """Give every process group our deadline: DeepSpeed clones the world group without its timeout."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave_ranks(ranks: Ranks) -> None:
    """Leave the groups in step with the others, without failing on peers that are already gone."""
    try:
        ranks.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        log.debug("process groups were already broken: %s", error)
