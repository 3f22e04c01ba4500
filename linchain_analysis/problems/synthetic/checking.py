"""Checks of the numbers and names that a setting is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Integral, Real

from linchain_analysis.errors import InputError


def require_whole(place: str, value: object, *, least: int) -> None:
    """Raise an `InputError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(
            place, expected=f"a whole number of at least {least}", got=repr(value), do="give such a number"
        )


def require_number(
    place: str,
    value: object,
    *,
    least: float = 0.0,
    most: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise an `InputError` unless `value` is finite, in [least, most], more than `above` and less than `below`."""
    number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    good = math.isfinite(number) and least <= number <= most
    if not good or (above is not None and number <= above) or (below is not None and number >= below):
        limits = [f"at least {least:g}" if above is None else f"more than {above:g}"]
        if below is not None:
            limits.append(f"less than {below:g}")
        elif most < math.inf:
            limits.append(f"at most {most:g}")
        expected = f"a finite number, {' and '.join(limits)}"
        raise InputError(place, expected=expected, got=repr(value), do="give such a number")


def require_choice(place: str, value: object, choices: Sequence[str]) -> None:
    """Raise an `InputError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        close = get_close_matches(str(value), choices, n=1)
        do = f"did you mean {close[0]!r}?" if close else "choose one of them"
        raise InputError(place, expected=f"one of {', '.join(choices)}", got=repr(value), do=do)
