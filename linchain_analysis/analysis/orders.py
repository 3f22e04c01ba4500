"""How large each order of a step is in recorded runs: the parts in which 1, 2, … factors stand with their update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from linchain_analysis.analysis.replication import RUN_COLUMNS
from linchain_analysis.analysis.trajectories import trajectories
from linchain_analysis.errors import InputError

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

# Single numbers of a module and step that the same measure takes, beside the list by order.
SHARES = ("first_order_share", "interaction_ratio")
_DO = 'track with preset `full`, or with measures=["orders"]'


def measure_order_ratios(runs: RunSet) -> pd.DataFrame:
    """Return one row for each run, recorded step, module and order.

    Returns:
        `RUN_COLUMNS`, `step module order order_ratio first_order_share interaction_ratio`, the last two the same for
        every order. Rows where the update of delta is 0 are left out, since no share of it is defined; where it is not
        finite they stay, as NaN.

    Raises:
        InputError: A run did not record the orders of its steps.
    """
    names = ["step", "module", "order_ratios", *SHARES, "delta_update_norm"]
    try:
        frame = runs.read("modules", columns=names)
    except InputError:
        raise _nothing_recorded() from None
    frame = frame[frame["order_ratios"].notna() & (frame["delta_update_norm"] != 0)].reset_index(drop=True)
    if frame.empty:
        raise _nothing_recorded()
    counts = frame["order_ratios"].map(len).to_numpy(dtype=np.intp)
    spread = frame.loc[frame.index.repeat(counts), [*RUN_COLUMNS, "step", "module", *SHARES]]
    orders = np.concatenate([np.arange(1, count + 1) for count in counts])
    ratios = np.concatenate([np.asarray(values, dtype=np.float64) for values in frame["order_ratios"]])
    spread = spread.assign(order=orders, order_ratio=ratios).reset_index(drop=True)
    return spread[[*RUN_COLUMNS, "step", "module", "order", "order_ratio", *SHARES]]


def summarise_orders(runs: RunSet, window: int = 1) -> pd.DataFrame:
    """Return the mean over modules, then over seeds with a 95 % t interval, of every order at every step.

    Args:
        runs: Runs of any methods; those of `preset="full"` hold what is needed.
        window: As `trajectories` takes it.

    Returns:
        `quantity order` and the columns of `trajectories`, sorted. `quantity` is `order_ratio` (‖C_k‖/‖dΔW‖, the
        order k beside it), `first_order_share` (⟨C_1, dΔW⟩/‖dΔW‖²) or `interaction_ratio` (‖dΔW − C_1‖/‖dΔW‖), the
        last two of all orders together, with <NA> for the order. Ratios are norms: they need not sum to 1.

    Raises:
        InputError: A run did not record the orders of its steps, or two runs have one condition and the same seeds.
    """
    ratios = measure_order_ratios(runs)
    by_order = trajectories(ratios, "order_ratio", by=["order"], window=window).assign(quantity="order_ratio")
    once = ratios[ratios["order"] == 1]
    others = [trajectories(once, name, window=window).assign(quantity=name) for name in SHARES]
    table = pd.concat([by_order, *others], ignore_index=True)
    table["order"] = table["order"].astype("Int64")
    return _to_front(table, ["quantity", "order"])


def average_steps(table: pd.DataFrame, first: int = 1, last: int | None = None) -> pd.DataFrame:
    """Return the mean of `mean` over the steps `first` to `last` of what `summarise_orders` returned.

    It describes a stretch of a curve. Steps of one run depend on each other, so it carries no interval.
    """
    inside = table[(table["step"] >= first) & (table["step"] <= (table["step"].max() if last is None else last))]
    keys = ["quantity", "order", "problem", "method", "base_learning_rate"]
    means: pd.DataFrame = inside.groupby(keys, sort=False, dropna=False, observed=True)["mean"].mean().reset_index()
    return means


def _to_front(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    return table[[*names, *(name for name in table if name not in names)]]


def _nothing_recorded() -> InputError:
    return InputError(
        "orders", expected="runs that all recorded the orders of their steps", got="one without them", do=_DO
    )
