"""A raw c10d process group for one link: NCCL on GPUs, gloo on CPUs, never the default group.

Invariant: no operation outlasts its deadline (joining over NCCL has one of its own, `JOIN_S`), and a group that failed
once is never used again. Destroying a group may block (gloo: until a stuck operation times out; NCCL: while another
communicator hangs, NVIDIA/nccl#1013), so the last reference is always dropped in a thread of its own.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from common.weights.errors import Cause, LinkError

_POLL_S = 0.0005
ERROR_S = 1.0  # from NCCL's error, or its completion, to that of the stream behind it: microseconds where all is well
JOIN_S = 30  # the default of weights.deadline_s; an integer, as torch reads it
_ENVIRONMENT = threading.Lock()

# Read by ProcessGroupNCCL's constructor. With the defaults its watchdog tears the whole process down when a
# peer of this group dies: the learner must survive that, so errors are polled for here instead.
_NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
# Read by the process's first NCCL group, which is DeepSpeed's or vLLM's: it watches a flag that any group's time-out
# sets, ours too, to dump traces and, minutes later, end the process. So this must stand before that group is made.
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
# Seconds that the join of a non-blocking communicator is polled for, at its first broadcast: half an hour by default, during
# which it cannot be aborted. torch reads it once, at the process's first NCCL call, and uses it for such groups only.
os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(JOIN_S))


class Group:
    """`world` processes that share broadcasts from rank 0.

    The constructor of the gloo backend blocks until all ranks have joined or `timeout` has passed; NCCL joins at the
    first broadcast, which blocks for `JOIN_S` at most (TORCH_NCCL_NONBLOCKING_TIMEOUT) before its own timeout begins.

    Args:
        store: the run's store (any c10d store).
        name: unique for each generation of a link: a name is never used twice.
        rank, world: rank 0 sends.
        device: of the tensors to be sent.
        timeout: seconds to wait for the peers.
        host: local address to use (gloo); None takes the default interface.

    Raises:
        LinkError: DEADLINE when a peer never joins.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        world: int,
        device: torch.device | str,
        timeout: float,
        host: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        scope = dist.PrefixStore(name, store)
        build = _build_nccl if self.device.type == "cuda" else _build_gloo
        try:
            self._backend: Any = build(scope, rank, world, timeout, host)
        except Exception as error:
            raise LinkError(
                Cause.DEADLINE, f"peer did not join within {timeout:g} s: {_brief(error)}"
            ) from None

    def broadcast(self, buffer: torch.Tensor, timeout: float) -> None:
        """Sends `buffer` from rank 0 (or receives into it), complete on return.

        Complete for the sender means handed to the network, not that the peer has it: receivers acknowledge.

        Raises:
            LinkError: DEADLINE or PEER_LOST; the group is closed then.
        """
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = datetime.timedelta(seconds=timeout)
        started = time.monotonic()
        try:
            work = self._open_backend().broadcast([buffer], options)
            work.wait()  # NCCL: only orders the current stream behind the transfer
            if self.device.type == "cuda":
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(self.device))
                wait_for_device(work.is_completed, done.query, timeout)
            self._open_backend()  # an abort by another thread ends NCCL's kernel, and so looks like completion
        except RuntimeError as error:
            self.close()
            late = time.monotonic() - started >= 0.95 * timeout or "NCCL timeout" in str(error)
            raise LinkError(Cause.DEADLINE if late else Cause.PEER_LOST, _brief(error)) from None
        except LinkError:
            self.close()
            raise

    def _open_backend(self) -> Any:
        if (backend := self._backend) is None:
            raise LinkError(Cause.PEER_LOST, "the group was closed")
        return backend

    def close(self) -> None:
        """Aborts what is under way and lets go of the group; never blocks."""
        box, self._backend = [self._backend], None
        if box[0] is not None:
            threading.Thread(target=_reap, args=(box,), name="weights-reaper", daemon=True).start()


def wait_for_device(
    ended: Callable[[], bool],
    done: Callable[[], bool],
    timeout: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Polls until the device is through with a transfer; never blocks on the device itself.

    Args:
        ended: of NCCL's work: true when its kernel is through, and also when it has met an error, after which the kernel
            goes on waiting for its peer until the communicator is aborted.
        done: of an event on the stream that was ordered behind the work: true when the buffer may be used.
        timeout: seconds.

    Raises:
        LinkError: DEADLINE, or PEER_LOST when the work ended and the device did not.
    """
    end, broken = clock() + timeout, float("inf")
    while not done():
        now = clock()
        if now > end:
            raise LinkError(Cause.DEADLINE, f"broadcast not complete after {timeout:g} s")
        if now > broken:
            raise LinkError(Cause.PEER_LOST, "NCCL reported an error during a broadcast")
        if broken == float("inf") and ended():
            broken = now + ERROR_S
        sleep(_POLL_S)


def use_own_stream(device: torch.device, stream: torch.cuda.Stream | None = None) -> torch.cuda.Stream | None:
    """Puts the calling thread on `device` and on a stream of its own, `stream` if given; returns that stream.

    Does nothing for the CPU. Transfers must serialise neither with the model's kernels nor with one another. torch hands out
    32 streams of each priority in turn, so each link keeps the one it has got, and takes it from those of high priority:
    the model's are of the other kind.
    """
    if device.type != "cuda":
        return None
    torch.cuda.set_device(device)
    stream = stream or torch.cuda.Stream(device, priority=-1)
    torch.cuda.set_stream(stream)
    return stream


def local_address_towards(host: str, port: int) -> str:
    """The address of this machine's interface that routes to `host` (no packet is sent)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def _build_gloo(store: dist.Store, rank: int, world: int, timeout: float, host: str | None) -> Any:
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    device = c10d.ProcessGroupGloo.create_device(hostname=host) if host else None
    options._devices = [device or c10d.ProcessGroupGloo.create_default_device()]
    return c10d.ProcessGroupGloo(store, rank, world, options)


def _build_nccl(store: dist.Store, rank: int, world: int, timeout: float, host: str | None) -> Any:
    del host  # NCCL chooses its interface itself (NCCL_SOCKET_IFNAME)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    options.config.blocking = 0  # a communicator whose peer never comes must be abortable
    options.is_high_priority_stream = True  # see `use_own_stream`
    with _environment(_NCCL_ENVIRONMENT):
        return c10d.ProcessGroupNCCL(store, rank, world, options)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the duration of a constructor; other groups keep the defaults."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _reap(box: list[Any]) -> None:
    try:
        box[0].abort()
    except RuntimeError:
        pass  # aborting what is already broken; dropping it below is all that is left to do
    finally:
        box.clear()


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
