"""Lines that belong together, and which of them a screen has room for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from linchain_analysis.watching.glyphs import Glyphs

LABEL = 13  # cells of what stands before each line
Part = str | tuple[str, str]  # a text, with its style


@dataclass(frozen=True)
class Block:
    """Lines that are shown together.

    Attributes:
        rank: How dear it is: blocks of a smaller rank are shown first where there is not room for all.
        lines: What it says.
        rows: Of a table the word for its rows, which may be fewer then; the first line is its heading.
    """

    rank: int
    lines: Sequence[Text]
    rows: str = ""


def choose_lines(blocks: Sequence[Block], height: int | None, glyphs: Glyphs) -> list[Text]:
    """Return the lines of the blocks that fit, in their order; None is room for all."""
    if height is None:
        return [line for block in blocks for line in block.lines]
    chosen: dict[int, Sequence[Text]] = {}
    room = height
    for place in sorted(range(len(blocks)), key=lambda place: blocks[place].rank):
        block = blocks[place]
        lines = block.lines
        if len(lines) > room and block.rows and room >= 3:
            more = f"{glyphs.ellipsis} {len(lines) - room + 1} more {block.rows}"
            lines = [*lines[: room - 1], Text(more, style="dim", no_wrap=True)]
        if len(lines) <= room:
            chosen[place] = lines
            room -= len(lines)
    return [line for place in sorted(chosen) for line in chosen[place]]


def make_line(parts: Iterable[Part], width: int, glyphs: Glyphs, *, gap: int = 3) -> Text:
    """Return a line of as many parts as fit whole; only the first one is cut.

    Args:
        parts: What it says, the most important first.
        width: Of the terminal.
        glyphs: What the terminal can show.
        gap: Spaces between two parts.
    """
    line = Text(no_wrap=True, overflow="crop")
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        if not text:
            continue
        text = (" " * gap if line.cell_len else "") + text
        if line.cell_len + cell_len(text) > width:
            if not line.cell_len:
                line.append(fit(text, width, glyphs), style)
            break
        line.append(text, style)
    return line


def label_line(label: str, label_width: int, parts: Sequence[Part] | Text, width: int, glyphs: Glyphs) -> Text:
    """Return a line whose parts, or whose text, begin behind a label."""
    line = Text(no_wrap=True, overflow="crop").append(fit(label, label_width, glyphs), "dim")
    return line + (parts if isinstance(parts, Text) else make_line(parts, width - label_width, glyphs))


def fit(text: str, width: int, glyphs: Glyphs) -> str:
    """Return `text` in exactly `width` cells, cut with an ellipsis or filled with spaces."""
    if cell_len(text) > width:
        end = glyphs.ellipsis[:width]
        return set_cell_size(text, width - len(end)) + end
    return set_cell_size(text, width)


def fit_middle(text: str, width: int, glyphs: Glyphs) -> str:
    """Return `text` in exactly `width` cells, cut in its middle: names of runs differ at their ends."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    end = (width - len(glyphs.ellipsis)) // 2
    begin = width - len(glyphs.ellipsis) - end
    return fit(set_cell_size(text, begin) + glyphs.ellipsis + (text[-end:] if end > 0 else ""), width, glyphs)


def wrap_text(text: str, width: int, most_lines: int, glyphs: Glyphs) -> list[str]:
    """Return a text on some lines, cut with an ellipsis where it takes more."""
    return textwrap.wrap(text, width, max_lines=most_lines, placeholder=f" {glyphs.ellipsis}")


def spread(left: Text, right: Text, width: int) -> Text:
    """Return a line with something at either end."""
    room = max(width - right.cell_len, 0)
    shown = left.copy()
    shown.truncate(max(room - 1, 0), overflow="crop")
    shown.append(" " * (room - shown.cell_len))
    return shown + right
