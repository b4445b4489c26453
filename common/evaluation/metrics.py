"""Estimators: pass@k, and confidence intervals by resampling questions.

Invariant: the unit of resampling is the question, never the response: answers to one question are not
independent of one another. Results depend on nothing but the arguments and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_CHUNK_VALUES = 4_000_000  # resampled values held at one time (32 MB)


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.

    Args:
        samples: n, responses to the question.
        correct: c, how many of them are correct.
        k: responses that one may try, at most n.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples does not exist")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of per-question `values` with a percentile bootstrap interval (Efron 1979).

    Args:
        values: one per question, at least one.
        confidence: of the interval, 0..1.
        resamples: drawn with replacement.
        seed: of the draw.
    """
    return stratified_bootstrap([values], confidence=confidence, resamples=resamples, seed=seed)


def stratified_bootstrap(
    sets: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Unweighted mean over sets of their means (the paper's average), questions resampled within each set."""
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in sets:
        means += _resampled_means(np.asarray(values, dtype=np.float64), resamples, rng) / len(sets)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    mean = float(np.mean([np.mean(values) for values in sets]))
    return Interval(mean, float(low), float(high))


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `resamples` draws with replacement; float64 [resamples]."""
    if not values.size:
        raise ValueError("nothing to resample: the set has no answers")
    means = np.empty(resamples)
    step = max(1, _CHUNK_VALUES // values.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[rng.integers(0, values.size, (count, values.size))].mean(1)
    return means
