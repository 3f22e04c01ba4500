"""Figures of the plane of shear and rotation, tested by the table they return and by the artists in them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from linchain_analysis.analysis.plane import follow
from linchain_analysis.errors import InputError
from linchain_analysis.plots.maps import plot_maps
from linchain_analysis.plots.plane import plot_plane
from linchain_analysis.problems.synthetic.targets import rotation, shear

TARGET = shear(1.0) @ rotation(np.pi / 3)


def paths(angles: list[float], shears: list[float], method: str = "lora-2", run: str = "a") -> pd.DataFrame:
    deltas = np.stack(
        [np.zeros((2, 2)), *(shear(k) @ rotation(np.radians(a)) for a, k in zip(angles, shears, strict=True))]
    )
    return follow(deltas[None], pd.DataFrame({"run": [run], "method": [method]}), TARGET)


def _marked(axes: Axes, marker: str) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.get_lines()
        if line.get_marker() == marker
    ]


def test_lines_are_the_paths_with_start_end_and_optimum() -> None:
    drawn = plot_plane(paths([20.0, 40.0, 55.0], [0.2, 0.5, 0.9]), TARGET)
    axes = drawn.figure.axes[0]
    (line,) = (line for line in axes.get_lines() if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(line.get_xdata(), [20, 40, 55], rtol=1e-12)
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.5, 0.9], rtol=1e-12)
    assert _marked(axes, "o") == [pytest.approx((20.0, 0.2))]
    assert _marked(axes, "s") == [pytest.approx((55.0, 0.9))]
    assert _marked(axes, "*") == [pytest.approx((60.0, 1.0))]
    assert drawn.table["step"].tolist() == [1, 2, 3]
    assert "Star: the target, θ = 60°, k = 1;" in drawn.caption
    assert "Each line is one run, 1 per method and panel." in drawn.caption
    assert "range of shears" not in drawn.caption


def test_the_nearest_matrix_of_rank_one_is_marked() -> None:
    drawn = plot_plane(paths([20.0], [0.2]), TARGET)
    left, sigma, right = np.linalg.svd(TARGET)
    nearest = sigma[0] * np.outer(left[:, 0], right[0])
    amount = (nearest[0] @ nearest[1]) / (nearest[0] @ nearest[0])
    assert _marked(drawn.figure.axes[0], "D") == [
        pytest.approx((np.degrees(np.arctan2(nearest[0, 1], nearest[0, 0])), amount))
    ]


def test_a_path_that_turns_beyond_the_edge_goes_on_at_the_other() -> None:
    drawn = plot_plane(paths([170.0, 190.0], [0.0, 0.0]), TARGET)
    line = max(drawn.figure.axes[0].get_lines(), key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(line.get_xdata(), [170, np.nan, -170])
    assert drawn.figure.axes[0].get_xlim() == (-180, 180)


def test_panels_keep_their_order_and_share_their_axes() -> None:
    frame = pd.concat(
        [
            paths([20.0, 60.0], [0.0, 1.0], run=name, method=method).assign(panel=panel)
            for name, method, panel in (
                ("a", "lora-2", "second"),
                ("b", "moslora-2", "first"),
                ("c", "lora-2", "first"),
            )
        ]
    )
    drawn = plot_plane(frame, TARGET, panel="panel")
    titles = [axes.get_title() for axes in drawn.figure.axes[:2]]
    assert titles == ["second", "first"]
    assert drawn.figure.axes[0].get_ylim() == drawn.figure.axes[1].get_ylim()
    (legend,) = drawn.figure.legends
    assert {text.get_text() for text in legend.get_texts()} >= {"lora-2", "moslora-2", "after step 1", "target"}


def test_a_wild_shear_does_not_flatten_the_view_and_the_caption_counts_it() -> None:
    tame = [paths([20.0, 60.0], [0.0, 1.0], run=str(k)) for k in range(19)]
    drawn = plot_plane(pd.concat([*tame, paths([20.0, 60.0], [1e6, 1.0], run="wild")]), TARGET)
    assert drawn.figure.axes[0].get_ylim()[1] < 3
    assert "1 of 20 runs leave the range of shears" in drawn.caption


def test_no_path_is_refused() -> None:
    with pytest.raises(InputError, match="plot_plane: expected paths"):
        plot_plane(paths([20.0], [0.0]).iloc[:0], TARGET)


def test_maps_are_drawn_as_images_of_the_square() -> None:
    drawn = plot_maps({"shear": shear(2.0), "rotation": rotation(np.pi / 2)})
    corners = drawn.table[drawn.table["shape"] == "square"].set_index("panel")[["x", "y"]]
    np.testing.assert_allclose(corners.loc["shear"], [[0, 0], [1, 0], [3, 1], [2, 1], [0, 0]])
    # A quarter turn counter-clockwise.
    np.testing.assert_allclose(corners.loc["rotation"], [[0, 0], [0, 1], [-1, 1], [-1, 0], [0, 0]], atol=1e-15)
    with pytest.raises(InputError, match=r"maps of 2 × 2, got large: \(3, 3\)"):
        plot_maps({"large": np.eye(3)})
