"""Figure: training loss over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linchain_analysis.analysis.caveats import list_caveats
from linchain_analysis.analysis.replication import Scale
from linchain_analysis.analysis.trajectories import choose_window, count_steps, trajectories
from linchain_analysis.analysis.units import find_loss_unit
from linchain_analysis.plots.content import Content, define_columns, describe_bands, label_axis, require_curves
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.panels import draw_content
from linchain_analysis.plots.style import WIDTHS

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

# A loss that falls further than this is drawn on a logarithmic axis: on a linear one its first steps would hide all
# that comes after.
_LINEAR_RATIO = 5.0


def plot_loss(runs: RunSet, *, width: float | None = None) -> Drawn:
    """Draw the training loss of each method: mean over seeds with a 95 % t interval.

    A loss that falls by more than a factor of 5 is drawn on a logarithmic axis, as geometric mean with the interval of
    the logarithm.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        width: In inches; a column of ICML if unset.

    Raises:
        InputError: If no loss is finite, or a method stands at several problems or learning rates.
    """
    return draw_content(prepare_loss(runs), width)


def prepare_loss(runs: RunSet) -> Content:
    """Compute what `plot_loss` draws."""
    frame = runs.read("steps", columns=["step", "loss"])
    window = choose_window(count_steps(frame))
    table = trajectories(frame, "loss", window=window)
    require_curves("loss", table, "check that the runs have steps, and that their losses are numbers")
    positive = table["mean"][table["mean"] > 0]
    wide = positive.size > 0 and table["mean"].min() > 0 and positive.max() > _LINEAR_RATIO * positive.min()
    scale: Scale = "log" if wide else "linear"
    if wide:
        # On that axis an interval around the arithmetic mean would reach below zero and say nothing.
        table = trajectories(frame, "loss", window=window, scale=scale)
    table.insert(0, "panel", "all")
    table.insert(0, "quantity", "loss")
    unit = find_loss_unit(runs)
    return Content(
        name="loss",
        table=table,
        titles={"all": ""},
        label=label_axis("training loss", "steps", "loss", unit),
        scale=scale,
        sentences=("Training loss.", *describe_bands(table, scale), *list_caveats(frame, table)),
        columns=define_columns("steps", ["step", "loss"], unit),
        width=WIDTHS["icml-column"],
        panel_height=2.1,
    )
