"""Figure: what maps of the plane do to a square with a letter in it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from linchain_analysis.errors import InputError
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import BLUE, WIDTHS, paper_style

# An F has no symmetry, so that every turn and every reflection of it can be told.
_LETTER = np.array([[0.25, 0.1], [0.25, 0.9], [0.75, 0.9], [0.25, 0.9], [0.25, 0.5], [0.6, 0.5]])
_SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])


def plot_maps(maps: Mapping[str, ArrayLike], *, width: float = WIDTHS["icml-page"]) -> Drawn:
    """Draw the unit square with an F in it, and in a panel for each map what becomes of both: x → x M.

    Args:
        maps: Matrices (2, 2) by the name of their panel.
        width: In inches.

    Raises:
        InputError: No map, or one of another size.
    """
    matrices = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in maps.items()}
    wrong = [f"{name}: {matrix.shape}" for name, matrix in matrices.items() if matrix.shape != (2, 2)]
    if wrong or not matrices:
        raise InputError("plot_maps", expected="maps of 2 × 2", got=", ".join(wrong) or "none", do="give such maps")
    parts = []
    with paper_style():
        figure = Figure(figsize=(width, 0.3 + 0.8 * width / len(matrices)), layout="constrained")
        grid = figure.subplots(1, len(matrices), sharex=True, sharey=True, squeeze=False)
        for axes, (name, matrix) in zip(grid[0], matrices.items(), strict=True):
            for shape, line in (("square", _SQUARE), ("letter", _LETTER)):
                image = line @ matrix
                axes.plot(*line.T, color="#A0A0A0", linewidth=0.7)
                axes.plot(*image.T, color=BLUE, linewidth=1.4 if shape == "letter" else 0.9)
                parts.append(pd.DataFrame({"panel": name, "shape": shape, "x": image[:, 0], "y": image[:, 1]}))
            axes.set_title(name, pad=3)
            axes.set_aspect("equal")
    caption = "The unit square and a letter in it (grey), and what each map makes of them (blue); row vectors, x → x M."
    return Drawn(figure, pd.concat(parts, ignore_index=True), caption, ())
