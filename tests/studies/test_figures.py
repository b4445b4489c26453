"""Bands and whiskers show what their captions say: one standard deviation, and the range over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.figures import band, grid, save, whiskers


@given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=5), min_size=1, max_size=4))
def test_whiskers_end_at_the_extremes(groups: list[list[float]]) -> None:
    means, (below, above) = whiskers(groups)
    assert min(*below, *above, 0.0) == 0.0  # matplotlib refuses others
    np.testing.assert_allclose(np.subtract(means, below), [min(group) for group in groups], atol=1e-9)
    np.testing.assert_allclose(np.add(means, above), [max(group) for group in groups], atol=1e-9)


def test_band_is_the_standard_deviation_of_a_sample_of_seeds(tmp_path: Path) -> None:
    values = [1.0, 2.0, 6.0]
    rows = [{"seed": seed, "step": step, "y": y + step} for seed, y in enumerate(values) for step in (0, 1)]
    seen = []

    def draw(figure) -> None:
        (axis,) = grid(figure, 1, 1)
        band(axis, [*rows, {"seed": 0, "step": 2, "y": None}], "step", "y")
        seen.append((axis.lines[0].get_ydata(), axis.collections[0].get_paths()[0].get_extents()))

    save(draw, tmp_path / "f.png", "band")
    line, extents = seen[0]
    assert list(line) == [3.0, 4.0]
    spread = np.std(values, ddof=1)
    assert (extents.y0, extents.y1) == pytest.approx((3.0 - spread, 4.0 + spread))


def test_one_seed_has_no_band_and_a_figure_is_small(tmp_path: Path) -> None:
    rows = [{"seed": 0, "step": step, "y": float(step)} for step in range(3)]

    def draw(figure) -> None:
        (axis,) = grid(figure, 1, 1)
        band(axis, rows, "step", "y")
        assert np.ptp(axis.collections[0].get_paths()[0].vertices[:, 1]) == 2.0

    save(draw, tmp_path / "f.png", "one seed")
    assert 1000 < (tmp_path / "f.png").stat().st_size < 50_000
