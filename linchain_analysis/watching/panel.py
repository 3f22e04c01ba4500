"""Everything there is to see of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from linchain_analysis.watching.blocks import LABEL, Block, Part, label_line, make_line, wrap_text
from linchain_analysis.watching.glyphs import Glyphs, average_buckets, draw_curve
from linchain_analysis.watching.kinds import kind_blocks
from linchain_analysis.watching.status import message_of, progress_of, tell_finding, tell_pace, tell_skipped, title_of
from linchain_analysis.watching.view import WINDOW, RunView
from linchain_analysis.watching.wording import tell_number, tell_share

_MOST_FINDINGS = 5
_EXAMINED_AFTER = 10  # steps: earlier there is no report
_HIGH = 36  # lines of a screen that has room for more than the most important


def panel_blocks(view: RunView, width: int, height: int | None, glyphs: Glyphs) -> list[Block]:
    """Return the blocks of the full panel, in their order from top to bottom."""
    head = [title_of(view, width, glyphs), *message_of(view, width, glyphs)]
    if view.status in ("damaged", "unreadable"):
        return [Block(0, head)]
    if not view.steps.num_rows:
        return [Block(0, head), Block(1, [make_line([("no step yet", "dim")], width, glyphs)])]
    steps = view.steps
    inner = width - LABEL

    def line(label: str, *parts: Part) -> Text:
        return label_line(label, LABEL, parts, width, glyphs)

    gradient: list[Part] = [f"norm {tell_number(steps.grad_norm)}"]
    if not math.isnan(steps.clipped_share):
        share = steps.clipped_share
        gradient.append(f"clipped {tell_share(share)}" if share else "never clipped")
    loss: list[Part] = [(tell_number(steps.loss), "bold")]
    loss += [f"mean of {min(WINDOW, steps.num_rows)}: {tell_number(steps.loss_mean)}"]
    loss += [f"lr {tell_number(steps.learning_rate)}"] if not math.isnan(steps.learning_rate) else []
    pace = tell_pace(view, glyphs)
    blocks = [
        Block(0, head),
        Block(1, [label_line("step", LABEL, progress_of(view, inner, glyphs), width, glyphs)]),
        *([Block(3, [line("pace", *pace)])] if pace else []),
        *_health_blocks(view, width, height, glyphs),
        Block(2, [line("loss", *loss)]),
        _loss_curve(view, width, height, glyphs),
        Block(7, [line("gradient", *gradient, tell_skipped(view))]),
    ]
    if not math.isnan(steps.track_milliseconds):
        cost = f"{steps.track_milliseconds:.2f} ms a step (median)"
        share_of_time = f"{100 * steps.track_share:.2f} % of the time" if not math.isnan(steps.track_share) else ""
        blocks.append(Block(10, [line("tracking", cost, share_of_time)]))
    if view.evals:
        said = [f"{e.split} {e.metric} {tell_number(e.value)} (step {e.step:,})" for e in view.evals]
        blocks.append(Block(8, _wrap("evals", [glyphs.clean(text) for text in said], width, glyphs)))
    return blocks if view.status == "reading" else blocks + kind_blocks(view, width, glyphs)


def _health_blocks(view: RunView, width: int, height: int | None, glyphs: Glyphs) -> list[Block]:
    blocks = []
    if not view.findings and view.is_examined and view.steps.num_rows >= _EXAMINED_AFTER:
        return [Block(9, [label_line("health", LABEL, [("nothing found", "dim")], width, glyphs)])]
    most_lines = 3 if height is None or height >= _HIGH else 1
    for place, finding in enumerate(view.findings[:_MOST_FINDINGS]):
        lines = wrap_text(tell_finding(finding, glyphs), width - LABEL, most_lines, glyphs)
        labels = ["health" if place == 0 else "", *([""] * (len(lines) - 1))]
        said = [
            label_line(label, LABEL, [(line, "yellow")], width, glyphs)
            for label, line in zip(labels, lines, strict=True)
        ]
        blocks.append(Block(4 if place == 0 else 9, said))
    if len(view.findings) > _MOST_FINDINGS:
        more = f"and {len(view.findings) - _MOST_FINDINGS} more findings"
        blocks.append(Block(9, [label_line("", LABEL, [(more, "yellow")], width, glyphs)]))
    return blocks


def _loss_curve(view: RunView, width: int, height: int | None, glyphs: Glyphs) -> Block:
    """The loss of all steps, with its highest and lowest place beside it."""
    rows = 4 if height is None or height >= _HIGH else 2 if height >= 26 else 1
    room = width - LABEL
    lines = draw_curve(view.steps.losses, room, rows, glyphs)
    drawn = average_buckets(view.steps.losses, room)
    finite = drawn[np.isfinite(drawn)]
    sides = [""] * rows
    if len(finite) and rows > 1:
        sides[0], sides[-1] = tell_number(float(finite.max())), tell_number(float(finite.min()))
    return Block(
        5,
        [
            Text(f"{side:>{LABEL - 1}} ", style="dim", no_wrap=True, overflow="crop").append(curve, "not dim cyan")
            for side, curve in zip(sides, lines, strict=True)
        ],
    )


def _wrap(label: str, parts: Sequence[str], width: int, glyphs: Glyphs) -> list[Text]:
    """Lines of whole parts, as many lines as it takes."""
    lines: list[list[Part]] = [[]]
    used = 0
    for part in parts:
        needed = len(part) + (3 if used else 0)
        if used and used + needed > width - LABEL:
            lines.append([])
            used, needed = 0, len(part)
        lines[-1].append(part)
        used += needed
    return [label_line("" if place else label, LABEL, own, width, glyphs) for place, own in enumerate(lines)]
