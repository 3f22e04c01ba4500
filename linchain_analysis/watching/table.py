"""Many runs at once, each in a row of one table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from linchain_analysis.watching.blocks import Block, fit, fit_middle, make_line
from linchain_analysis.watching.glyphs import Glyphs, draw_line
from linchain_analysis.watching.status import STYLES, is_quiet, tell_progress
from linchain_analysis.watching.view import WINDOW, RunView
from linchain_analysis.watching.wording import tell_number, tell_rank, tell_small, tell_time

_HEADING = ("step", "loss", "rank", "ratio", "left")
_NOTE = f"loss: mean of {WINDOW} steps; rank, update ratio: median over all modules, last step"
_GAP = 2
_SHORT, _LONG = 12, 20  # cells of a name: at least, and before anything is left out for it
_CURVE = (16, 40)


def table_blocks(views: Sequence[RunView], width: int, glyphs: Glyphs) -> list[Block]:
    """Return the table and how many runs of each status there are."""
    counts = {status: sum(view.status == status for view in views) for status in STYLES}
    summary = f"{len(views)} runs: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    cells = [_cells(view, glyphs) for view in views]
    statuses = [_status(view) for view in views]
    status = max(cell_len(text) for text in ["status", *statuses])
    longest = max(cell_len(glyphs.clean(view.name)) for view in views)
    # No column is wider than what it says, and one that says nothing is left out.
    columns = [place for place in range(len(_HEADING)) if any(own[place] for own in cells)]
    widths = {place: max(len(_HEADING[place]), *(len(own[place]) for own in cells)) for place in columns}
    name = _room(width, status, widths)
    if name < min(longest, _LONG) and len(_HEADING) - 1 in widths:
        del widths[len(_HEADING) - 1]
        name = _room(width, status, widths)
    name = min(max(name, _SHORT), longest)
    curve = min(_room(width, status, widths) - name - _GAP, _CURVE[1])

    gap = " " * _GAP
    heading = [fit("run", name, glyphs), fit("status", status, glyphs)]
    heading += [f"{_HEADING[place]:>{size}}" for place, size in widths.items()]
    heading += ["loss, at each step"] if curve >= _CURVE[0] else []
    rows = []
    for view, own, said in zip(views, cells, statuses, strict=True):
        row = Text(fit_middle(glyphs.clean(view.name), name, glyphs), no_wrap=True, overflow="crop")
        row.append(gap).append(fit(said, status, glyphs), "bold yellow" if said == "quiet" else STYLES[view.status])
        if view.status in ("damaged", "unreadable"):
            message = fit(glyphs.clean(view.message or ""), max(width - row.cell_len - _GAP, 0), glyphs)
            rows.append(row.append(gap + message.rstrip(), "red"))
            continue
        row.append("".join(f"{gap}{own[place]:>{size}}" for place, size in widths.items()))
        if curve >= _CURVE[0]:
            row.append(gap).append(draw_line(view.steps.losses, curve, glyphs), "cyan")
        rows.append(row)
    head = make_line([(gap.join(heading), "dim")], width, glyphs)
    return [
        Block(0, [make_line([(summary, "bold")], width, glyphs)]),
        Block(1, [head, *rows], "runs"),
        Block(2, [make_line([(_NOTE, "dim")], width, glyphs)]),
    ]


def _room(width: int, status: int, widths: dict[int, int]) -> int:
    """What the columns leave for a name."""
    return width - status - sum(widths.values()) - _GAP * (len(widths) + 1)


def _status(view: RunView) -> str:
    return "quiet" if is_quiet(view) else view.status


def _cells(view: RunView, glyphs: Glyphs) -> tuple[str, ...]:
    """What the columns say, nothing where a run has none."""
    if not view.steps.num_rows:
        return ("",) * len(_HEADING)
    return (
        tell_progress(view),
        tell_number(view.steps.loss_mean),
        tell_rank(view.rank, glyphs),
        tell_small(view.ratio, glyphs),
        tell_time(view.seconds_left, glyphs) if view.seconds_left > 0 else "",
    )
