"""A few runs at once, some lines for each."""

from __future__ import annotations

from rich.text import Text

from linchain_analysis.watching.blocks import LABEL, Block, Part, fit, label_line
from linchain_analysis.watching.glyphs import Glyphs, draw_line
from linchain_analysis.watching.status import (
    message_of,
    progress_of,
    tell_finding,
    tell_pace,
    title_of,
)
from linchain_analysis.watching.view import WINDOW, RunView
from linchain_analysis.watching.wording import tell_number, tell_rank, tell_small


def compact_blocks(view: RunView, width: int, glyphs: Glyphs, *, first: bool) -> list[Block]:
    """Return the blocks of a run among few, separated from the one before by an empty line."""
    head = [title_of(view, width, glyphs), *message_of(view, width, glyphs)]
    blocks = [] if first else [Block(8, [Text()])]
    blocks.append(Block(0, head))
    steps = view.steps
    if not steps.num_rows:
        return blocks
    loss = f"{tell_number(steps.loss):<9} mean of {min(WINDOW, steps.num_rows)}: {tell_number(steps.loss_mean):<9}"
    curve = draw_line(steps.losses, max(width - LABEL - len(loss) - 3, 0), glyphs)
    blocks += [
        Block(1, [label_line("step", LABEL, progress_of(view, width - LABEL, glyphs), width, glyphs)]),
        Block(2, [label_line("loss", LABEL, [loss, (curve, "cyan")], width, glyphs)]),
    ]
    parts: list[Part] = [
        f"{tell_rank(view.rank, glyphs)}",
        f"update ratio {tell_small(view.ratio, glyphs)}",
        f"grad norm {tell_number(steps.grad_norm)}",
    ]
    if view.ranks:
        blocks.append(Block(3, [label_line("eff. rank", LABEL, parts, width, glyphs)]))
    pace = tell_pace(view, glyphs)
    blocks += [Block(5, [label_line("pace", LABEL, pace, width, glyphs)])] if pace else []
    if view.findings:
        others = f" (and {len(view.findings) - 1} more)" if len(view.findings) > 1 else ""
        text = fit(tell_finding(view.findings[0], glyphs), width - LABEL - len(others), glyphs) + others
        blocks.append(Block(4, [label_line("health", LABEL, [(text, "yellow")], width, glyphs)]))
    if view.evals:
        said = [f"{e.split} {e.metric} {tell_number(e.value)}" for e in reversed(view.evals)]
        blocks.append(Block(6, [label_line("evals", LABEL, [glyphs.clean(text) for text in said], width, glyphs)]))
    return blocks
