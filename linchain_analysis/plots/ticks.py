"""Ticks of logarithmic axes that can be read however little of them is in view."""

from __future__ import annotations

import math

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

_FINE_DECADES = 2.0  # of fewer, too few powers of ten are in view to be read by
_NARROW = 5.0  # within a smaller ratio 1, 2, 5, 10, … may leave a single tick


def tick_logarithmic(axis: Axis, low: float, high: float, num_powers: int = 5) -> None:
    """Put numbers on a logarithmic axis: at powers of ten, at 1, 2 and 5 times these, or at even steps.

    Args:
        axis: The axis, whose limits must stay as they are.
        low: Its lower limit, above 0.
        high: Its upper limit.
        num_powers: About how many powers of ten have room.
    """
    axis.set_minor_formatter(NullFormatter())
    if math.log10(high / low) > _FINE_DECADES:
        axis.set_major_locator(LogLocator(numticks=num_powers))
        return
    axis.set_major_formatter("{x:g}")
    if high / low >= _NARROW:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())


def pad_limits(low: float, high: float, share: float = 0.06, least: float = 1.5) -> tuple[float, float]:
    """Return limits of a logarithmic axis with a margin around positive values, of a ratio of at least `least`²."""
    margin = max((high / low) ** share, math.sqrt(max(1.0, least**2 * low / high)))
    return low / margin, high * margin
