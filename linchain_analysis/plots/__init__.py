"""One figure, one function: each draws runs in paper style and returns the figure with the table it shows."""

from __future__ import annotations

from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.gallery import FIGURES, Gallery, draw_gallery
from linchain_analysis.plots.learning_rates import plot_learning_rates
from linchain_analysis.plots.loss import plot_loss
from linchain_analysis.plots.maps import plot_maps
from linchain_analysis.plots.norms import plot_gradient_norms, plot_update_norms
from linchain_analysis.plots.overview import plot_overview
from linchain_analysis.plots.plane import plot_plane
from linchain_analysis.plots.ranks import plot_effective_rank
from linchain_analysis.plots.saving import save_figure
from linchain_analysis.plots.style import WIDTHS, assign_styles, paper_style

__all__ = [
    "FIGURES",
    "WIDTHS",
    "Drawn",
    "Gallery",
    "assign_styles",
    "draw_gallery",
    "paper_style",
    "plot_effective_rank",
    "plot_gradient_norms",
    "plot_learning_rates",
    "plot_loss",
    "plot_maps",
    "plot_overview",
    "plot_plane",
    "plot_update_norms",
    "save_figure",
]
