"""One picture of all runs that are watched, in the layout that suits their number and the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group
from rich.text import Text

from linchain_analysis.watching.blocks import Block, choose_lines, make_line
from linchain_analysis.watching.glyphs import ASCII, UNICODE, Glyphs
from linchain_analysis.watching.overview import compact_blocks
from linchain_analysis.watching.panel import panel_blocks
from linchain_analysis.watching.table import table_blocks
from linchain_analysis.watching.view import RunView

_MOST_COMPACT = 4


def draw_frame(
    views: Sequence[RunView], width: int, height: int | None, glyphs: Glyphs, *, missing: Sequence[str] = ()
) -> Group:
    """Return a picture of runs that is at most `width` by `height`; None is as high as it takes.

    One run takes a full panel, up to four some lines each, more a row each. Running ones come first, newer ones before
    older ones.

    Args:
        views: The runs.
        width: Of the screen, in characters.
        height: Of the screen, in lines.
        glyphs: What it can show.
        missing: Paths without a run.
    """
    views = sorted(views, key=lambda view: view.started, reverse=True)
    views.sort(key=lambda view: view.is_over)
    blocks: list[Block]
    if len(views) == 1:
        blocks = panel_blocks(views[0], width, height, glyphs)
    elif len(views) <= _MOST_COMPACT:
        blocks = [
            block for place, view in enumerate(views) for block in compact_blocks(view, width, glyphs, first=place == 0)
        ]
    else:
        blocks = table_blocks(views, width, glyphs)
    if missing:
        blocks = [*blocks, Block(1, [draw_waiting(missing, width, glyphs)])]
    return Group(*choose_lines(blocks, height, glyphs))


def draw_waiting(places: Sequence[str], width: int, glyphs: Glyphs) -> Text:
    """Return the line that says that there is nothing to see yet."""
    before, after = "no run in ", " yet; waiting, Ctrl-C ends"
    where = glyphs.clean(", ".join(places))
    room = max(width - len(before) - len(after), len(glyphs.ellipsis))
    if cell_len(where) > room:  # of a path the end says most
        where = glyphs.ellipsis + where[len(where) - room + len(glyphs.ellipsis) :]
    return make_line([before + where + after], width, glyphs)


def glyphs_of(console: Console) -> Glyphs:
    """Return the characters that a console can show."""
    return ASCII if console.options.ascii_only else UNICODE
