"""The order of the questions: a seeded permutation per epoch.

Invariant: the order is a function of (seed, epoch, size) alone, the same on every machine and NumPy release: it
uses the raw PCG64 stream and a stable sort, which NumPy guarantees, not `Generator.permutation`, which it does not.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of range(size): the question index at each position of the epoch. Returns int64 [size]."""
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(draws, kind="stable")
    order.setflags(write=False)
    return order
