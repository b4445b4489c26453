"""One of two ranks: takes snapshots at every ZeRO stage and checks them (run by test_snapshot.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_lm

from learner.ranks import load_deepspeed
from learner.snapshot import take_snapshot

MIB = 1 << 20
BUCKET = 4 * MIB


def build(deepspeed, stage: int, dtype: torch.dtype, *, hidden: int, layers: int):
    model = tiny_lm(3, hidden=hidden, layers=layers).to(dtype)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype is torch.bfloat16},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def check_equal(deepspeed) -> None:
    """The snapshot is the initial model exactly: DeepSpeed has only partitioned it."""
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            engine = build(deepspeed, stage, dtype, hidden=32, layers=2)
            snapshot = take_snapshot(engine, dtype=torch.bfloat16, bucket_bytes=4096)
            assert (snapshot is not None) is (dist.get_rank() == 0)
            if snapshot is not None:
                expected = dict(tiny_lm(3).to(torch.bfloat16).named_parameters())
                got = dict(snapshot.tensors())
                assert got.keys() == expected.keys(), (stage, dtype)
                for name, parameter in expected.items():
                    assert torch.equal(got[name], parameter), (stage, dtype, name)
            engine.destroy()


def check_memory(deepspeed) -> None:
    """ZeRO-3 in float32: rank 0 grows by the snapshot and a bucket, the other rank by a bucket."""
    engine = build(deepspeed, 3, torch.float32, hidden=768, layers=8)
    base = reset_peak()
    snapshot = take_snapshot(engine, bucket_bytes=BUCKET)
    grown = status("VmHWM") - base
    held = snapshot.nbytes if snapshot is not None else 0
    largest = 2 * 768 * 768 * 4  # MLP matrix: a tensor is never split
    # A bucket is there twice for a moment (what is gathered, and its flat message); the rest is code and pools.
    allowed = held + 2 * max(BUCKET, largest) + 16 * MIB
    print(f"rank {dist.get_rank()}: {grown / MIB:.0f} MiB for a snapshot of {held / MIB:.0f} MiB")
    assert grown <= allowed, (grown / MIB, allowed / MIB)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes of a memory field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    deepspeed = load_deepspeed()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    {"equal": check_equal, "memory": check_memory}[sys.argv[1]](deepspeed)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort while the interpreter is torn down


if __name__ == "__main__":
    main()
