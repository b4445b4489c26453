"""How memory is kept between micro-batches: the C library's on CPU, torch's on a GPU.

On CPU, activations of a micro-batch are larger than what glibc keeps for reuse by default: it hands them back to the
kernel, which clears the same pages again for the next micro-batch. Keeping them costs nothing that the next
micro-batch would not need.
"""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger("slipstream.learner")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; False where the C library has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("this C library has no mallopt")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES))


def let_segments_grow() -> None:
    """Let torch's segments of GPU memory grow, unless the environment configures its allocator; before CUDA is used.

    Not for the `ipc` route: such memory cannot be shared between processes by handle.
    """
    if not any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
