"""What a process uses: GPU by NVML where there is one, processor and memory everywhere.

Invariant: telemetry never fails and never blocks: a meter that cannot be read is left out, not reported as 0.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence

import psutil
import pynvml

MIB = 1 << 20


@functools.cache
def _nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def gpu_count() -> int:
    """GPUs that NVML sees on this machine; 0 without a driver."""
    if not _nvml():
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(gpu_count())]
    if not _nvml():
        return []
    names = [part.strip() for part in chosen.split(",")]
    # As CUDA reads it: the first entry that names no device ("-1", Slurm's "NoDevFiles") ends the list.
    return list(itertools.takewhile(_names_a_gpu, names))


def _names_a_gpu(name: str) -> bool:
    return name.isdigit() or name.startswith(("GPU-", "MIG-"))


def _gpu_handle(name: str) -> object:
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _gpu_meters(number: int, name: str) -> dict[str, float]:
    meters: dict[str, float] = {}
    try:
        handle = _gpu_handle(name)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        meters[f"gpu{number}_memory_mb"] = memory.used / MIB
        meters[f"gpu{number}_memory_share"] = memory.used / memory.total
        meters[f"gpu{number}_use"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        meters[f"gpu{number}_power_w"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        meters[f"gpu{number}_temperature_c"] = float(
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        )
    except pynvml.NVMLError:
        pass  # what was read before the first unsupported meter stays
    return meters


class Telemetry:
    """Samples a process and its children; processor use is measured between two samples.

    Units: `cpu_cores` cores busy; `rss_mb` MiB resident; `gpuN_use` and `gpuN_memory_share` in 0..1;
    `gpuN_memory_mb` MiB; `gpuN_power_w` W; `gpuN_temperature_c` °C. N counts the GPUs visible to the process.
    """

    def __init__(self, gpus: Sequence[str] | None = None) -> None:
        self._gpus = visible_gpus() if gpus is None else list(gpus)
        self._known: dict[int, psutil.Process] = {}
        self.sample()

    def sample(self) -> dict[str, float]:
        """Read every meter once."""
        cores, resident = 0.0, 0.0
        for process in self._family():
            try:
                cores += process.cpu_percent(None) / 100
                resident += process.memory_info().rss / MIB
            except psutil.Error:
                continue
        meters = {"cpu_cores": cores, "rss_mb": resident}
        for number, name in enumerate(self._gpus):
            meters.update(_gpu_meters(number, name))
        return meters

    def _family(self) -> list[psutil.Process]:
        try:
            me = psutil.Process()
            found = [me, *me.children(recursive=True)]
        except psutil.Error:
            return []
        # Process objects are kept, because cpu_percent measures between two calls on the same object.
        self._known = {process.pid: self._known.get(process.pid, process) for process in found}
        return list(self._known.values())
