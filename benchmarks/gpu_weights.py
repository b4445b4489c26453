"""Drills the GPU routes of the weight push: 3 GB to a peer that answers, dies, freezes or never joins.

    python -m benchmarks.gpu_weights [--gigabytes 3] [--deadline 10]

Two processes on one GPU. NCCL refuses two ranks on one device unless they look like two hosts (NCCL_HOSTID);
where it still refuses, the drill says so and runs CUDA IPC alone. For each drill it prints how long the
learner's side took to be free again and whether the learner's process survived and still computes.

Invariant: the drilled code is the code that runs: `Publisher`, `LinkSender`, `Group`, `Stager`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from common.weights import Publisher, Snapshot
from common.weights.protocol import push_deadline
from common.weights.scripted import ScriptedReceiver

RUN = "gpu-drill"
_SPAWNED = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def _receive(address: str, deadline_s: float, answers: bool) -> None:
    os.environ["NCCL_HOSTID"] = "slipstream-drill-receiver"
    options = {"deadline_s": deadline_s, "device": "cuda:0", "joins": answers}
    ScriptedReceiver(address, RUN, "drilled", **options).run()


def drill(
    name: str, route: str, gigabytes: float, deadline_s: float, strike: Callable[[Any], None] | None
) -> None:
    """One push under one blow; prints a line."""
    publisher = Publisher(run_id=RUN, route=route, device="cuda:0", deadline_s=deadline_s, checksum_every=0)
    arguments = (publisher.address, deadline_s, name != "never joins")
    peer = _SPAWNED.Process(target=_receive, args=arguments, daemon=True)
    peer.start()
    try:
        _await(lambda: publisher.meters()["links"] == 1, 120)
        snapshot = _weights(gigabytes)
        nbytes, started = snapshot.nbytes, time.perf_counter()
        publisher.publish(1, snapshot)
        published = time.perf_counter() - started
        if strike is not None:
            time.sleep(0.05)
            strike(peer)
        limit = push_deadline(nbytes, 2 * deadline_s)
        _await(lambda: publisher.versions_acked() or publisher.meters()["failures"], limit)
        seconds = time.perf_counter() - started
        alive = bool(torch.ones(1000, device="cuda:0").sum().item() == 1000)
        rate = f"{nbytes / 1e9 / seconds:.1f} GB/s" if publisher.versions_acked() else "no version"
        print(
            f"{route:5} {name:12} publish {published * 1e3:7.1f} ms, over after {seconds:6.2f} s, {rate}, "
            f"failures {publisher.meters()['failures']}, learner computes: {alive}",
            flush=True,
        )
    finally:
        os.kill(peer.pid, signal.SIGCONT)
        peer.kill()
        peer.join()
        publisher.close()


def _weights(gigabytes: float) -> Snapshot:
    count = max(1, round(gigabytes * 1e9 / (2 * 8192 * 8192)))
    named = (
        (f"layer.{i}", torch.full((8192, 8192), i, dtype=torch.bfloat16, device="cuda:0"))
        for i in range(count)
    )
    return Snapshot.from_tensors(named, bucket_bytes=256 << 20, device="cuda:0")


def _await(condition: Callable[[], Any], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {timeout:g} s")
        time.sleep(0.005)


def _freeze(peer: Any) -> None:
    os.kill(peer.pid, signal.SIGSTOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--deadline", type=float, default=10.0)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_weights: no GPU here; the same code on gloo is measured by benchmarks.weights")
    os.environ["NCCL_HOSTID"] = "slipstream-drill-learner"
    blows: dict[str, Callable[[Any], None] | None] = {
        "answers": None,
        "killed": lambda peer: peer.kill(),
        "frozen": _freeze,
        "never joins": None,
    }
    for route in ("ipc", "nccl"):
        for name, strike in blows.items():
            try:
                drill(name, route, chosen.gigabytes, chosen.deadline, strike)
            except (RuntimeError, TimeoutError) as error:
                print(f"{route:5} {name:12} not possible here: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
