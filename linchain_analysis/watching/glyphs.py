"""Curves and bars made of characters, in Unicode blocks or, where a terminal has none, in ASCII."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linchain_analysis.watching.view import Array


@dataclass(frozen=True)
class Glyphs:
    """The characters that a terminal can show.

    Attributes:
        levels: From low to high.
        done: Of a bar.
        left: The rest of a bar.
        ellipsis: For what was cut.
        to: Between the ends of a range.
        nothing: In place of a number that there is not.
        delta: The change of a weight.
        is_ascii: Whether nothing else may be written.
    """

    levels: str
    done: str
    left: str
    ellipsis: str
    to: str
    nothing: str
    delta: str
    is_ascii: bool

    def clean(self, text: str) -> str:
        """Return `text` on one line, without what the terminal cannot show or would obey."""
        shown = "".join(character if character.isprintable() else " " for character in text)
        return shown.encode("ascii", "replace").decode() if self.is_ascii else shown


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "━", "─", "…", "–", "–", "ΔW", False)
ASCII = Glyphs("_.-=+*%#", "#", "-", "...", "-", "-", "delta", True)


def draw_line(values: Array, width: int, glyphs: Glyphs) -> str:
    """Return a curve of one row."""
    return draw_curve(values, width, 1, glyphs)[0]


def draw_curve(values: Array, width: int, rows: int, glyphs: Glyphs) -> list[str]:
    """Return a curve of at most `width` characters, from its lowest to its highest value.

    Each character is the mean of equally many values; a gap where none of them is finite.

    Args:
        values: In their order.
        width: Of the terminal, in characters.
        rows: How many lines it takes.
        glyphs: What the terminal can show.
    """
    means = average_buckets(values, width)
    finite = means[np.isfinite(means)]
    if not len(finite):
        return [""] * rows
    low, high = float(finite.min()), float(finite.max())
    num_levels = len(glyphs.levels)
    # In halves, because the difference of two floats need not be one.
    span = high / 2 - low / 2
    share = (means / 2 - low / 2) / span if span > 0 else np.where(np.isfinite(means), 0.5, np.nan)
    heights = [None if np.isnan(s) else 1 + round(s * (rows * num_levels - 1)) for s in share]
    lines = []
    for floor in range(num_levels * (rows - 1), -1, -num_levels):
        rest = [0 if height is None else min(max(height - floor, 0), num_levels) for height in heights]
        lines.append("".join(glyphs.levels[level - 1] if level else " " for level in rest))
    return lines


def average_buckets(values: Array, count: int) -> Array:
    """Return the means of the finite among the values of `count` equal parts, or the values if they are fewer."""
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= count:
        return values
    edges = np.linspace(0, len(values), count + 1).astype(np.int64)[:-1]
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(np.float64), edges)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges)
    means: Array = np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)
    return means


def draw_bar(share: float, width: int, glyphs: Glyphs) -> str:
    """Return a bar of which `share` is done."""
    done = min(max(int(share * width), 0), width)
    return glyphs.done * done + glyphs.left * (width - done)
