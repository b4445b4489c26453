"""A checksum of a tensor's bytes that gives the same value on CPU and GPU.

Invariant: equal bytes give equal checksums on every device, dtype and platform of the same endianness.
Not cryptographic: it finds damage and mix-ups, not forgery.

The sum is position-weighted (odd 64-bit weights, arithmetic modulo 2^64), so that swapped words are found;
it runs at memory speed with plain integer operations, which every torch device has.
"""

from __future__ import annotations

from functools import lru_cache

import torch

CHUNK_WORDS = 1 << 16  # half a MiB: weights and products stay in cache
_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the usual odd multiplier


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    positions = torch.arange(CHUNK_WORDS, dtype=torch.int64, device=device) * 2 + 1
    return positions * (_ODD - (1 << 64))


def checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits over the bytes of `tensor` (any dtype and shape; made contiguous)."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.data_ptr() % 8:
        padding = raw.new_zeros(-raw.numel() % 8)
        raw = torch.cat([raw, padding])
    words = raw.view(torch.int64)
    weights = _weights(words.device)
    sums = [(chunk * weights[: chunk.numel()]).sum() for chunk in words.split(CHUNK_WORDS)]
    total = tensor.numel() * tensor.element_size()
    for value in torch.stack(sums).tolist() if sums else []:
        total = (total * _ODD + value) & _MASK
    return f"{total:016x}"
