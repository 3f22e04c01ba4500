"""Lines that every layout has: what a run is, how it stands, how far it is."""

from __future__ import annotations

import math

from rich.text import Text

from linchain_analysis.watching.blocks import Part, make_line, spread
from linchain_analysis.watching.glyphs import Glyphs, draw_bar
from linchain_analysis.watching.view import Finding, RunView
from linchain_analysis.watching.wording import tell_share, tell_speed, tell_time

STYLES = {
    "reading": "dim",
    "starting": "dim",
    "running": "bold cyan",
    "complete": "bold green",
    "interrupted": "bold yellow",
    "failed": "bold red",
    "died": "bold red",
    "damaged": "bold red",
    "unreadable": "bold red",
}
_QUIET_SECONDS = 30.0  # say how long ago the last step was, if it is longer ago than this and than some steps take
_QUIET_STEPS = 10


def title_of(view: RunView, width: int, glyphs: Glyphs) -> Text:
    """Return the name of a run, what it trains, and its status at the right."""
    what = " on ".join(glyphs.clean(said) for said in (view.method, view.problem) if said)
    status = Text(view.status, style=STYLES.get(view.status, "bold"))
    name = glyphs.clean(view.name)
    left = make_line([(name, "bold"), (what, "dim")], width - len(view.status) - 1, glyphs)
    return spread(left, status, width)


def message_of(view: RunView, width: int, glyphs: Glyphs) -> list[Text]:
    """Return a line that says why, where there is something to say."""
    if not view.message:
        return []
    return [make_line([(glyphs.clean(view.message), STYLES.get(view.status, ""))], width, glyphs)]


def tell_progress(view: RunView) -> str:
    """How many steps of how many."""
    done = f"{view.steps.step:,}"
    return f"{done} of {view.num_steps:,}" if view.num_steps else done


def progress_of(view: RunView, width: int, glyphs: Glyphs) -> Text:
    """Return steps of steps with a bar, where the number of steps is known."""
    text = tell_progress(view)
    if not view.num_steps:
        return make_line([text], width, glyphs)
    share = view.steps.step / view.num_steps
    percent = f"{min(100 * share, 100):5.1f} %"
    room = width - len(text) - len(percent) - 4
    bar = draw_bar(share, min(room, 60), glyphs) if room >= 8 else ""
    line = Text(text, no_wrap=True, overflow="crop")
    if bar:
        line.append(f"  {bar}", STYLES.get(view.status, ""))
    line.append(f"  {percent}")
    return line


def tell_pace(view: RunView, glyphs: Glyphs) -> list[Part]:
    """How fast, for how long and how long still; how long nothing has happened, if that is long."""
    parts: list[Part] = []
    if is_quiet(view):
        parts.append((f"no step for {tell_time(view.quiet_seconds, glyphs)}", "bold yellow"))
    if not math.isnan(view.steps.steps_per_second):
        parts.append(tell_speed(view.steps.steps_per_second, glyphs))
    if view.seconds_left > 0:  # neither 0 nor NaN
        parts.append(f"left {tell_time(view.seconds_left, glyphs)}")
    if not math.isnan(view.steps.seconds):
        parts.append(f"took {tell_time(view.steps.seconds, glyphs)}")
    return parts


def is_quiet(view: RunView) -> bool:
    """Whether the last step is longer ago than one would expect."""
    usual = _QUIET_STEPS / view.steps.steps_per_second
    return view.status == "running" and view.quiet_seconds > max(_QUIET_SECONDS, 0.0 if math.isnan(usual) else usual)


def tell_finding(finding: Finding, glyphs: Glyphs) -> str:
    """A finding in words."""
    said = finding.message or finding.subject
    return glyphs.clean(f"{finding.finding} since step {finding.step:,}: {said}")


def tell_skipped(view: RunView) -> str:
    """How many steps the gradient scaler left out."""
    count = view.steps.num_skipped
    return f"skipped {count:,} ({tell_share(count / view.steps.num_rows)})" if count else "none skipped"
