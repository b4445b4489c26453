"""What the figures of all studies have in common: size, colours, bands over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.verdict import Row

# One colour per algorithm in every figure.
COLOURS = {
    "dr_grpo": "tab:purple",
    "wo_len": "tab:green",
    "wo_std": "tab:orange",
    "grpo": "tab:blue",
}
NAMES = {
    "dr_grpo": "Dr. GRPO",
    "grpo": "GRPO",
    "wo_len": "GRPO without the length term",
    "wo_std": "GRPO without the std term",
}

_PALETTE = 256  # colours of a file


def save(draw: Callable[[Any], None], path: Path, title: str) -> None:
    """Draw on a fresh figure and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(layout="constrained")
    draw(figure)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    _shrink(path)


def _shrink(path: Path) -> None:
    """A palette instead of 32 bits per pixel: a third of the size, for what is kept in the repository."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(_PALETTE, method=Image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)


def grid(figure: Any, rows: int, columns: int, size: tuple[float, float] = (4.6, 3.2)) -> list[Any]:
    """Axes in reading order; `size` is of one of them, in inches."""
    figure.set_size_inches(size[0] * columns, size[1] * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    return [axis for line in axes for axis in line]


def band(axis: Any, rows: Sequence[Row], x: str, y: str, *, smooth: int = 1, **style: Any) -> None:
    """Mean over seeds of `y` against `x`, with a band of one standard deviation.

    Args:
        axis: of matplotlib.
        rows: with `seed`, `x` and `y`; rows whose `y` is None are left out.
        x, y: keys.
        smooth: width of a centred moving average over x.
        style: of the line.
    """
    xs, table = _by_seed(rows, x, y)
    if not len(xs):
        return
    table = np.stack([_smoothed(series, smooth) for series in table])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nanmean(table, axis=0)
        spread = np.nanstd(table, axis=0, ddof=1) if len(table) > 1 else np.zeros_like(mean)
    (line,) = axis.plot(xs, mean, **style)
    axis.fill_between(xs, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)


def whiskers(values: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """(means, [below, above]) of groups of values: bars with the range over seeds as matplotlib's `yerr`."""
    means = [sum(group) / len(group) for group in values]
    # Not below 0: the mean of equal values may differ from them in its last bit.
    below = [max(0.0, mean - min(group)) for mean, group in zip(means, values, strict=True)]
    above = [max(0.0, max(group) - mean) for mean, group in zip(means, values, strict=True)]
    return means, [below, above]


def _by_seed(rows: Sequence[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of x, and [seeds, len(x)] of y; gaps are nan, x without any value are left out."""
    found = {(row["seed"], row[x]): row[y] for row in rows if row.get(y) is not None}
    xs = sorted({key[1] for key in found})
    seeds = sorted({key[0] for key in found})
    table = [[found.get((seed, value), np.nan) for value in xs] for seed in seeds]
    return np.array(xs), np.array(table, dtype=float)


def _smoothed(series: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average that ignores gaps."""
    if width <= 1:
        return series
    known = np.isfinite(series)
    kernel = np.ones(min(width, len(series)))
    total = np.convolve(np.where(known, series, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
