"""Whether the torch of this environment can use the GPU that the run is meant for.

Invariant: a worker that should use a GPU never falls back to the processor in silence: a CPU build in a GPU node's
environment, or a driver too old for the build, is one sentence that says what to do.
"""

from __future__ import annotations

import pynvml

from common.errors import UserError
from common.telemetry import visible_gpus

EXTRA_CUDA = 13  # major version of what constraints/gpu.txt installs
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}  # by major version of CUDA


def require_gpu_build(device: str) -> None:
    """Refuse a CPU build of torch where a GPU is to be used. Asks CUDA nothing: the caller may still fork.

    Args:
        device: `launch.device` of the recipe; "auto" wants a GPU where NVML shows one to this process.

    Raises:
        UserError: torch is a CPU build.
    """
    import torch

    if not _wanted(device) or torch.version.cuda or torch.version.hip:
        return
    why = "it is 'gpu'" if device == "gpu" else "this process has a GPU"
    raise UserError(
        f"{why}, but the torch of this environment is a CPU build: install the GPU build with "
        f"`SLIPSTREAM_EXTRA=gpu make setup` (driver R{MINIMUM_DRIVER[EXTRA_CUDA]} or newer), or set it to 'cpu'.",
        setting="launch.device",
    )


def require_gpu(device: str) -> None:
    """Refuse what `require_gpu_build` refuses, and a GPU that torch cannot use.

    Raises:
        UserError: torch is a CPU build, or the driver is missing or too old for its CUDA.
    """
    import torch

    require_gpu_build(device)
    if not _wanted(device) or torch.cuda.is_available():
        return
    cuda = torch.version.cuda or ""
    needed = MINIMUM_DRIVER.get(int(cuda.partition(".")[0] or 0), MINIMUM_DRIVER[EXTRA_CUDA])
    raise UserError(
        f"torch is built for CUDA {cuda} and finds no GPU that it can use: that needs an NVIDIA driver R{needed} or "
        f"newer, and here is {_driver()}.",
        setting="launch.device",
    )


def _wanted(device: str) -> bool:
    return device == "gpu" or (device == "auto" and bool(visible_gpus()))


def _driver() -> str:
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "none"
