"""Effective rank and update ratio by kind of module: side by side where there is room, else one below the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.text import Text

from linchain_analysis.watching.blocks import LABEL, Block, fit, label_line
from linchain_analysis.watching.glyphs import Glyphs, draw_line
from linchain_analysis.watching.view import KindRank, RunView
from linchain_analysis.watching.wording import tell_rank, tell_small

_LONGEST = 18  # cells of the longest name of a kind that is not cut
_CELL = 9  # of an update ratio
_NUMBERS = 7 + 2 + 13 + 2  # median, range and the spaces around them
_CURVE = 12  # at least so wide, else the ratios go below
_RATIO = "update ratio"


def kind_blocks(view: RunView, width: int, glyphs: Glyphs) -> list[Block]:
    """Return the table of ranks and that of update ratios, or a line that says why there is none."""
    if not view.ranks:
        return []
    longest = max(len(glyphs.clean(kind.kind)) for kind in view.ranks)
    name = max(LABEL, min(longest, _LONGEST) + 1)
    # Of chains of different length the longest says the order.
    chains = sorted(view.ratios.values(), key=len, reverse=True)
    factors = list(dict.fromkeys(factor for chain in chains for factor in chain))
    blocks = []
    if all(math.isnan(kind.median) for kind in view.ranks):
        why = "preset light takes no spectra" if view.preset == "light" else f"none yet: {glyphs.delta} is 0"
        blocks.append(Block(6, [label_line("eff. rank", name, [(why, "dim")], width, glyphs)]))
    else:
        curve = width - name - _NUMBERS
        beside = curve - 2 - _CELL * len(factors)
        heading = f"{fit('eff. rank', name, glyphs)}{'median':>7}  {'over layers':<13}  of {glyphs.delta}, at each step"
        if factors and beside >= _CURVE:
            ranks = [_rank_row(kind, name, beside, glyphs) for kind in view.ranks]
            rows = [
                row.append("  ").append_text(_ratio_cells(view.ratios.get(kind.kind, {}), factors, glyphs))
                for row, kind in zip(ranks, view.ranks, strict=True)
            ]
            # The word ends where the first of its columns begins.
            room = name + _NUMBERS + beside + 2 - len(_RATIO)
            head = fit(heading, room, glyphs) + _RATIO + _head_cells(factors)
            return [Block(6, [Text(head, style="dim", no_wrap=True, overflow="crop"), *rows], "kinds")]
        rows = [_rank_row(kind, name, max(curve, 0), glyphs) for kind in view.ranks]
        head = fit(heading, width, glyphs).rstrip()
        blocks.append(Block(6, [Text(head, style="dim", no_wrap=True, overflow="crop"), *rows], "kinds"))
    if factors:
        room = max((width - name) // _CELL, 1)
        # Of a chain that is too long for the screen its beginning and its end.
        shown = factors if len(factors) <= room else [*factors[: room - 2], "", factors[-1]][-room:]
        rows = [
            Text(fit(glyphs.clean(kind), name, glyphs), no_wrap=True, overflow="crop").append_text(
                _ratio_cells(ratios, shown, glyphs)
            )
            for kind, ratios in view.ratios.items()
        ]
        head = fit(_RATIO, name, glyphs) + _head_cells(shown)
        note = "  median over layers"
        head += note if len(head) + len(note) <= width else ""
        blocks.append(Block(11, [Text(head, style="dim", no_wrap=True, overflow="crop"), *rows], "kinds"))
    return blocks


def _rank_row(kind: KindRank, name: int, curve: int, glyphs: Glyphs) -> Text:
    """The name of a kind, its rank and how that came to be."""
    between = ""
    if not math.isnan(kind.median):
        between = f"{tell_rank(kind.low, glyphs):>5} {glyphs.to} {tell_rank(kind.high, glyphs):>5}"
    line = Text(fit(glyphs.clean(kind.kind), name, glyphs), no_wrap=True, overflow="crop")
    line.append(f"{tell_rank(kind.median, glyphs):>7}", "bold").append(f"  {between:<13}  ", "dim")
    drawn = draw_line(kind.medians, curve, glyphs) if curve > 0 and np.isfinite(kind.medians).any() else ""
    return line.append(fit(drawn, curve, glyphs), "cyan")


def _ratio_cells(ratios: Mapping[str, float], factors: Sequence[str], glyphs: Glyphs) -> Text:
    """Update ratios under their headings; nothing where a kind has no such factor."""
    cells = Text()
    for factor in factors:
        value = tell_small(ratios[factor], glyphs) if factor in ratios else ""
        cells.append(f"{value if factor else glyphs.ellipsis:>{_CELL}}")
    return cells


def _head_cells(factors: Sequence[str]) -> str:
    return "".join(f"{factor:>{_CELL}}" for factor in factors)
