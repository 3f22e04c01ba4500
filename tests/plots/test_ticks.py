"""Ticks of logarithmic axes: enough to read by, none over another, whatever the limits are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from linchain_analysis.plots.style import paper_style
from linchain_analysis.plots.ticks import pad_limits, tick_logarithmic

RATIOS = (2.25, 3.0, 4.9, 5.1, 9.0, 30.0, 99.0, 101.0, 1e4, 1e8)


@pytest.mark.parametrize("low", [0.8, 0.0731, 47.0, 1e-6])
@pytest.mark.parametrize("ratio", RATIOS)
def test_there_are_numbers_and_none_covers_another(low: float, ratio: float) -> None:
    with paper_style():
        figure = Figure(figsize=(2.2, 1.75), layout="constrained")  # as small as a panel of a figure is
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_ylim(low, low * ratio)
        tick_logarithmic(axes.yaxis, low, low * ratio, num_powers=6)
        figure.canvas.draw()
        inside = [
            label.get_window_extent()
            for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if low <= tick <= low * ratio and label.get_text()
        ]
        minor = [label.get_text() for label in axes.get_yticklabels(minor=True)]
    assert len(inside) >= 2
    assert not any(minor)
    bottoms, tops = (np.array([getattr(box, edge) for box in inside]) for edge in ("y0", "y1"))
    order = bottoms.argsort()
    # Boxes hold room for letters that go below the line; numbers in boxes that meet by less than a third do not touch.
    assert (tops[order][:-1] - bottoms[order][1:] < (tops - bottoms).min() / 3).all()


def test_limits_hold_the_values_with_a_margin_and_a_constant_has_room() -> None:
    low, high = pad_limits(2.0, 200.0)
    assert low == pytest.approx(2 / 100**0.06) and high == pytest.approx(200 * 100**0.06)
    low, high = pad_limits(1.0, 1.0)
    assert (low, high) == (pytest.approx(1 / 1.5), pytest.approx(1.5))
    assert pad_limits(1.0, 1.1)[1] / pad_limits(1.0, 1.1)[0] == pytest.approx(2.25)
