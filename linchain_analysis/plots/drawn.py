"""A figure together with the table it shows and the words it needs."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from linchain_analysis.plots.style import paper_style
from linchain_analysis.vocabulary import Column


@dataclass(frozen=True)
class Drawn:
    """A finished figure. JupyterLab shows it as the last value of a cell.

    Attributes:
        figure: The figure, outside pyplot's global state. Save it inside `paper_style()`, or by `save_figure`, so that
            its fonts are embedded as type 42.
        table: Exactly what was drawn, one row per method, panel and step.
        caption: What it shows, with unit, interval, smoothing and caveats.
        columns: Definitions of the columns it was computed from.
    """

    figure: Figure
    table: pd.DataFrame
    caption: str
    columns: tuple[Column, ...]

    def render(self, kind: str) -> bytes:
        """Return the figure as `pdf` or `png`; the same figure gives the same bytes in every process."""
        buffer = io.BytesIO()
        # Dates in a file would make every redrawing a change.
        dates = {"pdf": {"CreationDate": None, "ModDate": None}}
        with paper_style():
            self.figure.savefig(buffer, format=kind, metadata=dates.get(kind))
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        # In 64 colours, of which no figure here shows more but in its smoothed edges, it takes a quarter of the room
        # in a notebook.
        buffer = io.BytesIO()
        whole = Image.open(io.BytesIO(self.render("png"))).convert("RGB")
        whole.quantize(64).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()
