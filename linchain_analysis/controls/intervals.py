"""Mean of paired values over seeds, with its interval: what the controls that compare two trainings judge."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import stats

from linchain_analysis.analysis.replication import LEVEL


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return mean, low and high of the 95 % t interval; the unit of replication is one value, a seed.

    All are NaN where a value is not finite, low and high with a single value.
    """
    array = np.array(list(values), dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        return (float("nan"),) * 3
    mean = float(array.mean())
    if array.size == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.5 + LEVEL / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return mean, mean - half, mean + half


def ratio_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the geometric mean of positive values with the interval of the logarithm, carried back by exp.

    All are NaN where a value is not finite or not above 0.
    """
    array = np.array(list(values), dtype=np.float64)
    logs = np.log(array, out=np.full(array.shape, np.nan), where=array > 0)
    mean, low, high = (float(np.exp(value)) for value in mean_interval(logs))
    return mean, low, high
