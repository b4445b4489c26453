"""This machine: GPUs and their driver, disk, shared memory, limits, clock, leftovers of earlier runs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pynvml

from common.recipe import Recipe
from deploy.doctoring.findings import Finding, ok, problem, warning

GIB = 1 << 30
BUSY_SHARE = 0.1
OPEN_FILES = 4096
ENGINE_NAMES = ("VLLM::", "EngineCore")
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def check_gpus(recipe: Recipe | None) -> Iterator[Finding]:
    """NVML answers, the driver fits the CUDA that torch brings, and nobody else uses the GPUs."""
    wants = recipe is not None and recipe.launch.device == "gpu"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        text = f"NVML does not answer: {error}"
        if wants:
            yield problem("gpu", text, "install NVIDIA's driver, or set launch.device = 'cpu'")
        else:
            yield ok("gpu", f"no GPU ({error}); engines and learner run on the CPU")
        return
    try:
        yield from _driver()
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield _gpu(index)
    finally:
        pynvml.nvmlShutdown()


def _driver() -> Iterator[Finding]:
    driver, supported = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion() // 1000
    needed = cuda_of_torch()
    text = f"driver {driver}, CUDA up to {supported}"
    if needed is not None and needed > supported:
        yield problem(
            "driver",
            f"{text}, but torch was built for CUDA {needed}",
            f"update the driver to one for CUDA {needed}",
        )
    else:
        yield ok("driver", text)


def cuda_of_torch() -> int | None:
    """Major version of the CUDA runtime that is installed for torch; None on a CPU install."""
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"):
        try:
            return int(metadata.version(name).split(".")[0])
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return None


def _gpu(index: int) -> Finding:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = f"GPU {index} {pynvml.nvmlDeviceGetName(handle)}, {memory.total / GIB:.0f} GiB"
    if memory.used > BUSY_SHARE * memory.total:
        return warning(
            "gpu",
            f"{name}: {memory.used / GIB:.1f} GiB are in use already",
            "end what uses it (nvidia-smi shows it), or lower actor.gpu_memory_utilization",
        )
    return ok("gpu", name)


def check_disk(recipe: Recipe | None) -> Iterator[Finding]:
    """Room for checkpoints where the run folder will be, and locks, without which no broker serves there."""
    if recipe is not None:
        from common.model_files import read_shape
        from deploy.preflight import check_disk as room_for_checkpoints

        room_for_checkpoints(recipe, read_shape(recipe.model.path))
    root = (recipe.run.root if recipe else Path("runs")).resolve()
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free
    text = f"{free / GIB:.1f} GiB free at {root}"
    if free < 2 * GIB:
        yield warning("disk", text, "free some, or set run.root to a larger file system")
    else:
        yield ok("disk", text)
    yield from _locks(root)


def _locks(folder: Path) -> Iterator[Finding]:
    from broker.run_folder import no_flock

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        yield warning("disk", f"{folder} cannot be written", "set run.root to a folder of yours")
    except OSError as error:
        yield problem("disk", f"the file system of {folder} {no_flock(error)}", "see run.root")


def check_shared_memory(path: Path = Path("/dev/shm"), *, gpus: int = 0) -> Iterator[Finding]:
    """NCCL, gloo and vLLM exchange tensors through /dev/shm; containers get 64 MiB unless told otherwise."""
    if not path.is_dir():
        yield problem("shared memory", f"there is no {path}", "mount a tmpfs there")
        return
    free, needed = shutil.disk_usage(path).free, (1 + gpus) * GIB
    text = f"{free / GIB:.1f} GiB free in {path}"
    if free < needed // 4:
        yield problem(
            "shared memory", text, f"give it {needed // GIB} GiB (docker run --shm-size={needed // GIB}g)"
        )
    elif free < needed:
        yield warning(
            "shared memory", text, f"give it {needed // GIB} GiB, or remove what earlier runs left there"
        )
    else:
        yield ok("shared memory", text)


def check_limits(soft: int | None = None, *, rdma: bool | None = None) -> Iterator[Finding]:
    """Open files (a broker holds a socket per peer) and, with InfiniBand, locked memory."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    text = "no limit on open files" if soft == resource.RLIM_INFINITY else f"{soft} open files"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        yield warning("limits", text, f"ulimit -n {OPEN_FILES} (or LimitNOFILE=, /etc/security/limits.conf)")
    else:
        yield ok("limits", text)
    rdma = Path("/dev/infiniband").exists() if rdma is None else rdma
    if rdma and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        yield warning("limits", "locked memory is limited, and there is InfiniBand", "ulimit -l unlimited")


def check_clock_source() -> Iterator[Finding]:
    """Whether the kernel says that something keeps its clock right."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == TIME_ERROR:
        yield warning(
            "clock",
            "the kernel's clock is not synchronised",
            "run chronyd or systemd-timesyncd; with several hosts, points and logs will not line up",
        )
    elif state >= 0:
        yield ok("clock", "synchronised, says the kernel")


def check_leftovers() -> Iterator[Finding]:
    """Engine processes whose parent is gone: they hold memory and GPUs for nobody."""
    me, orphans = os.getuid(), []
    for process in psutil.process_iter(["pid", "ppid", "uids", "name", "cmdline"]):
        facts = process.info
        line = " ".join(facts["cmdline"] or [facts["name"] or ""])
        if facts["ppid"] == 1 and facts["uids"] and facts["uids"].real == me:
            orphans += [str(facts["pid"])] if any(name in line for name in ENGINE_NAMES) else []
    if orphans:
        yield warning(
            "leftovers",
            f"engine processes without a parent: {', '.join(orphans)}",
            f"kill {' '.join(orphans)}",
        )
    else:
        yield ok("leftovers", "no engine process without a parent")
