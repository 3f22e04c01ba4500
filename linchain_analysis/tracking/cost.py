"""What tracking cost: told at the end of a run."""

from __future__ import annotations

from array import array

import numpy as np


class Cost:
    """The seconds of a run's steps and of the tracking in them."""

    def __init__(self) -> None:
        self._seconds, self._own = array("d"), array("d")

    def add(self, seconds: float, own_seconds: float) -> None:
        """Count a step that took `seconds`, of which tracking took `own_seconds`."""
        self._seconds.append(seconds)
        self._own.append(own_seconds)

    def describe(self) -> str:
        """Return the median milliseconds a step and the share of all time, or nothing where there is no step."""
        if not self._own:
            return ""
        share = sum(self._own) / max(sum(self._seconds), 1e-9)
        median = 1e3 * float(np.median(self._own))
        return f"tracking took {median:.2f} ms a step (median), {100 * share:.2f} % of the time"
