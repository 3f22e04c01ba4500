"""Several answers to "how many directions?", from the spectra that the runs stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from linchain_analysis.analysis.replication import RUN_COLUMNS
from linchain_analysis.measures import spectral

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet

RANKS = {
    "effective_rank": spectral.effective_rank,
    "effective_rank_squared": spectral.effective_rank_squared,
    "stable_rank": spectral.stable_rank,
    "num_directions": spectral.num_directions,
}


def measure_ranks(runs: RunSet) -> pd.DataFrame:
    """Return the ranks of delta for every run, recorded step and module where delta is not zero.

    The effective rank weighs the tail of the spectrum: one value of 1 over fifteen of 0.12 has effective rank 10.9 and
    stable rank 1.2. So none of them is shown alone.

    Returns:
        `RUN_COLUMNS`, `step`, `module` and `effective_rank effective_rank_squared stable_rank num_directions`, the
        last for 90 % of Σσ². Rows with delta = 0 or without a stored spectrum are left out, since no rank is defined
        there; a spectrum with NaN or Inf stays, as NaN. Empty where no run stored spectra.
    """
    frame: pd.DataFrame = runs.read("modules", columns=["step", "module", "spectrum"])
    frame = frame[frame["spectrum"].notna()]
    sigma = stack_spectra(frame["spectrum"])
    moved = (sigma != 0).any(axis=-1)  # NaN counts as moved
    table: pd.DataFrame = frame.loc[moved, [*RUN_COLUMNS, "step", "module"]].reset_index(drop=True)
    return table.assign(**{name: measure(sigma[moved]) for name, measure in RANKS.items()})


def stack_spectra(spectra: pd.Series) -> NDArray[np.float64]:
    """Return spectra of different lengths as one array (k, r_max), padded with zeros on the right."""
    lengths = np.array([len(spectrum) for spectrum in spectra], dtype=np.intp)
    sigma = np.zeros((len(lengths), lengths.max(initial=1)))
    sigma[np.arange(sigma.shape[1]) < lengths[:, None]] = np.concatenate([*spectra, []])
    return sigma
