"""Figure: loss, ranks, gradient norms and update norms of a comparison on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from linchain_analysis.errors import InputError
from linchain_analysis.plots.content import Content
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.loss import prepare_loss
from linchain_analysis.plots.norms import prepare_gradient_norms, prepare_update_norms
from linchain_analysis.plots.panels import count_rows, draw_legend, draw_panels, legend_height
from linchain_analysis.plots.ranks import prepare_effective_rank
from linchain_analysis.plots.style import WIDTHS, assign_styles, paper_style
from linchain_analysis.vocabulary import Column

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

CONTENTS = {
    "loss": prepare_loss,
    "effective-rank": prepare_effective_rank,
    "gradient-norms": prepare_gradient_norms,
    "update-norms": prepare_update_norms,
}
_TOP = ("loss", "effective-rank")  # these two share the first row
_TOP_HEIGHT, _ROW_HEIGHT = 1.95, 1.55


def plot_overview(runs: RunSet, *, width: float = WIDTHS["icml-page"]) -> Drawn:
    """Draw loss, ranks, gradient norms and update norms together, leaving out what the runs did not record.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        width: In inches.

    Raises:
        InputError: If there is nothing at all to draw, or a method stands at several problems or learning rates.
    """
    contents, refusals = prepare_contents(runs, list(CONTENTS))
    if not contents:
        raise refusals[0]
    return draw_overview(contents, width=width)


def prepare_contents(runs: RunSet, names: Sequence[str]) -> tuple[list[Content], list[InputError]]:
    """Compute the named contents; one that has nothing to draw is refused without stopping the others."""
    contents, refusals = [], []
    for name in names:
        try:
            contents.append(CONTENTS[name](runs))
        except InputError as error:
            refusals.append(error)
    return contents, refusals


def draw_overview(contents: Sequence[Content], *, width: float = WIDTHS["icml-page"]) -> Drawn:
    """Draw several contents as one figure, lettered in order."""
    styles = assign_styles(method for content in contents for method in content.methods)
    top = [content for content in contents if content.name in _TOP]
    below = [content for content in contents if content.name not in _TOP]
    heights = [_TOP_HEIGHT] * bool(top) + [_ROW_HEIGHT * count_rows(content) for content in below]
    with paper_style():
        figure = Figure(figsize=(width, sum(heights) + legend_height(styles, width)), layout="constrained")
        rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        places: list[SubFigure] = []
        if top:
            # A panel of its own is given more room than one of several that share an axis.
            ratios = [len(content.titles) + (0.35 if len(content.titles) == 1 else 0.0) for content in top]
            places += list(rows[0].subfigures(1, len(top), width_ratios=ratios, squeeze=False)[0])
        places += list(rows[bool(top) :])
        ordered = [*top, *below]
        for place in [*rows, *places]:
            # The layout solver leaves its edge at 0 or at -0, by chance, which would make two PDFs of one figure.
            place.patch.set_visible(False)
        for letter, place, content in zip("abcdefgh", places, ordered, strict=False):
            draw_panels(place, content, styles)
            place.text(0.006, 0.99, letter, fontsize=10, fontweight="bold", va="top")
        draw_legend(figure, styles, width)
    return Drawn(figure, _join_tables(ordered), _join_captions(ordered), _join_columns(ordered))


def _join_tables(contents: Sequence[Content]) -> pd.DataFrame:
    tables = [content.table.assign(part=letter) for letter, content in zip("abcdefgh", contents, strict=False)]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "part", table.pop("part"))
    return table


def _join_captions(contents: Sequence[Content]) -> str:
    """What each part shows, then every other sentence once, with the parts it holds for."""
    parts = dict(zip("abcdefgh", contents, strict=False))
    shown = [f"({letter}) {content.sentences[0]}" for letter, content in parts.items()]
    letters: dict[str, list[str]] = {}
    for letter, content in parts.items():
        for sentence in content.sentences[1:]:
            letters.setdefault(sentence, []).append(letter)
    rest = [
        sentence if len(own) == len(parts) else f"({', '.join(own)}) {sentence}" for sentence, own in letters.items()
    ]
    return " ".join([*shown, *rest])


def _join_columns(contents: Sequence[Content]) -> tuple[Column, ...]:
    return tuple(dict.fromkeys(column for content in contents for column in content.columns))
