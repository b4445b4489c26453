"""Ask the Hugging Face hub only when it can answer.

Invariant: on a machine without a network, what is cached is used and what is not fails at once, instead of
after the hub client's minute of retries.
"""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlparse

DEFAULT_ENDPOINT = "https://huggingface.co"


@functools.cache
def prepare_hub() -> bool:
    """Whether the hub's name resolves; if not, its client is switched to its cache. Call before importing it."""
    host = urlparse(os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)).hostname or ""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        return False
    return True
