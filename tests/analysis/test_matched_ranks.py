"""Ranks between recorded steps, outside them, and of runs that left the finite numbers on the way."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from synthetic_runs import rows

from linchain_analysis.analysis.matched_ranks import match_ranks, summarise_matched_ranks

LOSSES = [0.9, 0.4, 0.3, 0.2, 0.1]


def match(recorded: dict[int, float], losses: list[float] = LOSSES) -> pd.DataFrame:
    """Ranks of one run by step of record, beside its loss of every step, at losses of 0.5, 0.2 and 0.1."""
    loss = rows("lora-8", 0, {"step": range(1, len(losses) + 1), "relative_loss": losses})
    ranks = rows("lora-8", 0, {"step": list(recorded), "effective_rank": list(recorded.values())})
    return match_ranks(loss, ranks.assign(module="map"), "relative_loss", [0.5, 0.2, 0.1])


def test_outside_the_recorded_steps_there_is_no_rank() -> None:
    found = match({3: 3.0, 4: 2.0}).set_index("moment")
    assert found["step"].tolist() == [2.0, 4.0, 5.0, 4.0, 4.0]
    # Step 2 is before the first record and step 5 after the last: neither has the value of the nearest.
    ranks = found["effective_rank"]
    assert math.isnan(ranks["loss ≤ 0.5"])
    assert math.isnan(ranks["loss ≤ 0.1"])
    assert ranks[["loss ≤ 0.2", "smallest", "at the end"]].tolist() == [2.0, 2.0, 2.0]
    summary = summarise_matched_ranks(found.reset_index()).set_index("moment")
    assert summary.loc["loss ≤ 0.5", ["num_seeds", "num_missing"]].tolist() == [0, 1]


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_one_missing_value_leaves_no_smallest_and_no_end(broken: int) -> None:
    recorded = {1: 4.0, 3: 3.0, 5: 2.0}
    found = match({**recorded, broken: math.nan}).set_index("moment").loc[["smallest", "at the end"]]
    assert found[["step", "effective_rank"]].isna().all(axis=None)
    whole = match(recorded).set_index("moment").loc[["smallest", "at the end"]]
    assert whole["effective_rank"].tolist() == [2.0, 2.0]


def test_the_smallest_is_not_the_last() -> None:
    found = match({1: 4.0, 3: 1.0, 5: 2.0}).set_index("moment")
    assert found.loc["smallest", ["step", "effective_rank"]].tolist() == [3.0, 1.0]
    assert found.loc["at the end", ["step", "effective_rank"]].tolist() == [5.0, 2.0]
