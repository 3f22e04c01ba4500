"""Numbers as they are read: with units, and as short as they can be."""

from __future__ import annotations

import math

from linchain_analysis.watching.glyphs import Glyphs


def tell_number(value: float) -> str:
    """Four digits that count; NaN and Inf by name, because in a loss they say something."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def tell_small(value: float, glyphs: Glyphs) -> str:
    """A number whose magnitude says most: 1.2e-03."""
    return glyphs.nothing if math.isnan(value) else f"{value:.1e}"


def tell_rank(value: float, glyphs: Glyphs) -> str:
    """A rank with two decimals."""
    return glyphs.nothing if math.isnan(value) else f"{value:.2f}"


def tell_share(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def tell_speed(steps_per_second: float, glyphs: Glyphs) -> str:
    """Steps a second, or seconds a step where a step is long."""
    if math.isnan(steps_per_second):
        return f"{glyphs.nothing} steps/s"
    if steps_per_second < 0.5:
        return f"{tell_time(1 / steps_per_second, glyphs)} a step"
    return f"{steps_per_second:.{1 if steps_per_second < 100 else 0}f} steps/s"


def tell_time(seconds: float, glyphs: Glyphs) -> str:
    """A time in its two largest units."""
    if not math.isfinite(seconds):
        return glyphs.nothing
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
