"""All figures of a set of runs: computed once, drawn one by one and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linchain_analysis.errors import InputError
from linchain_analysis.plots.columns import list_drawables, refuse_unknown
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.measures import find_diverged, prepare_measure
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


def find_figures(runs: RunSet, asked: Sequence[str], place: str = "names") -> list[str]:
    """Return the names of the figures that are asked for; the name of a column may have `_` for its dashes.

    Args:
        runs: Says which there are.
        asked: Names of `FIGURES`, or of columns.
        place: Where they were asked for, for the error.

    Raises:
        InputError: A name that no figure of these runs has.
    """
    names = [name.replace("_", "-") for name in asked]
    if all(name in FIGURES for name in names):
        return names
    found = list_drawables(runs, FIGURES)
    for name in names:
        if name not in FIGURES and name not in found:
            possible = [key for key, drawable in found.items() if drawable.column.kind != "spectrum"]
            raise refuse_unknown(name, [*FIGURES, *possible], place)
    return names


def draw_gallery(runs: RunSet, names: Sequence[str] | None = None) -> Gallery:
    """Draw the named figures; what the runs did not record is left out, with its reason.

    Args:
        runs: Runs of one problem, each method at one learning rate.
        names: Of `FIGURES`, or of columns with dashes for `_`; by default those of `FIGURES` and of every column that
            measures recorded.
    """
    others = {} if names is not None and set(names) <= set(FIGURES) else list_drawables(runs, FIGURES)
    if names is None:
        names = [*FIGURES, *(name for name, drawable in others.items() if drawable.measured)]
    contents, refusals = prepare_contents(runs, [name for name in CONTENTS if name in names or OVERVIEW in names])
    by_name = {content.name: content for content in contents}
    diverged = find_diverged(runs) if any(name in others for name in names) else None
    figures = {}
    for name in names:
        try:
            if name == OVERVIEW and contents:
                figures[name] = draw_overview(contents)
            elif name in by_name:
                figures[name] = draw_content(by_name[name])
            elif name in others and diverged is not None:
                figures[name] = draw_content(prepare_measure(runs, others[name], diverged))
            elif name not in FIGURES:
                raise InputError(
                    name, expected="a column of these runs", got="none of that name", do="draw other runs, or record it"
                )
        except InputError as error:
            refusals.append(error)
    return Gallery(figures, tuple(refusals))
