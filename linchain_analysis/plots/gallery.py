"""All figures of a set of runs: computed once, drawn one by one and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linchain_analysis.errors import InputError
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.overview import CONTENTS, draw_overview, prepare_contents
from linchain_analysis.plots.panels import draw_content

if TYPE_CHECKING:
    from linchain_analysis.analysis import RunSet

OVERVIEW = "overview"
FIGURES = (OVERVIEW, *CONTENTS)


@dataclass(frozen=True)
class Gallery:
    """What could be drawn of some runs.

    Attributes:
        figures: Figures by name, in the order asked for.
        left_out: Why the others are missing.
    """

    figures: dict[str, Drawn]
    left_out: tuple[InputError, ...]


def draw_gallery(runs: RunSet, names: Sequence[str] = FIGURES) -> Gallery:
    """Draw the named figures; what the runs did not record is left out, with its reason.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        names: Of `FIGURES`.
    """
    contents, refusals = prepare_contents(runs, [name for name in CONTENTS if name in names or OVERVIEW in names])
    by_name = {content.name: content for content in contents}
    figures = {}
    for name in names:
        if name == OVERVIEW and contents:
            figures[name] = draw_overview(contents)
        elif name in by_name:
            figures[name] = draw_content(by_name[name])
    return Gallery(figures, tuple(refusals))
