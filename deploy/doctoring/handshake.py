"""Two processes meet over gloo or NCCL, on one host or on two, and say how it went.

Invariant: whoever does not come is waited for at most `timeout_s`; the process group is this module's own.

    python -m deploy.doctoring.handshake --rank 0 --address HOST:PORT --backend gloo --timeout-s 30
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

ELEMENTS = 1 << 20  # 4 MiB of float32: enough to leave the latency regime, little enough for a slow link
ROUNDS = 5


def meet(rank: int, address: str, backend: str, timeout_s: float) -> dict[str, Any]:
    """Join a group of two, sum a tensor a few times, return what was seen.

    Args:
        rank: 0 serves the rendezvous at `address`, 1 comes to it.
        address: "HOST:PORT" of rank 0.
        backend: "gloo", or "nccl" (takes GPU `rank` of a single host, GPU 0 of its own host otherwise).
        timeout_s: seconds that each wait may last.

    Returns:
        `seconds` until both had met, and `gib_per_s` of the all-reduce that followed.
    """
    import torch
    import torch.distributed as dist

    host, port = address.rsplit(":", 1)
    started = time.monotonic()
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, int(port), 2, rank == 0, limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank if torch.cuda.device_count() > 1 else 0)
    data = torch.ones(ELEMENTS, device=device)
    dist.all_reduce(data)
    if data.min().item() != 2 or data.max().item() != 2:
        raise RuntimeError("the sum over two processes is wrong")
    met = time.monotonic() - started
    begun = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(data)
    moved = float(data[0].item())  # waits for the device
    rate = ROUNDS * ELEMENTS * 4 / (time.monotonic() - begun) / (1 << 30)
    dist.destroy_process_group()
    return {"seconds": round(met, 3), "gib_per_s": round(rate, 3), "sum": moved, "host": socket.gethostname()}


def start(rank: int, address: str, backend: str, interface: str | None, timeout_s: float) -> subprocess.Popen:
    """One side of the handshake in a process of its own, which a hung NCCL cannot take us down with."""
    command = [sys.executable, "-m", "deploy.doctoring.handshake"]
    environment = dict(os.environ)
    if interface:
        environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return subprocess.Popen(
        [
            *command,
            f"--rank={rank}",
            f"--address={address}",
            f"--backend={backend}",
            f"--timeout-s={timeout_s}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, deadline: float) -> tuple[dict[str, Any] | None, str]:
    """The result of one side, or None and the reason; `deadline` on the monotonic clock."""
    try:
        out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, "no answer in time"
    if process.returncode:
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        return None, lines[-1][:300] if lines else f"exit code {process.returncode}"
    return json.loads(out.splitlines()[-1]), ""


def main() -> None:
    """Command line of one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--timeout-s", type=float, default=30.0)
    options = parser.parse_args()
    print(json.dumps(meet(options.rank, options.address, options.backend, options.timeout_s)), flush=True)
    os._exit(0)  # gloo's threads may abort an orderly exit


if __name__ == "__main__":
    main()
