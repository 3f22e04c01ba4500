"""Several answers to "how many directions?", from the spectra that the runs stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from linchain_analysis.analysis.replication import RUN_COLUMNS
from linchain_analysis.measures import spectral
from linchain_analysis.runs.ragged import measure_ragged

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
    stored = frame["spectrum"].notna()
    spectra = frame.pop("spectrum")[stored].to_list()
    ranks = pd.DataFrame(measure_spectra(spectra))
    moved = ranks.pop("moved") != 0
    table: pd.DataFrame = frame.loc[stored, [*RUN_COLUMNS, "step", "module"]]
    return pd.concat([part[moved.to_numpy()].reset_index(drop=True) for part in (table, ranks)], axis=1)


def measure_spectra(spectra: Sequence[ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Return `RANKS` of spectra of any lengths, and as `moved` 0 for those of zeros, 1 for others, NaN among them."""
    lengths = np.fromiter(map(len, spectra), dtype=np.int64, count=len(spectra))  # type: ignore[arg-type]
    flat = np.concatenate(spectra) if len(spectra) else np.zeros(0)
    return measure_ragged(flat, lengths, {**RANKS, "moved": _moved})


def _moved(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((sigma != 0).any(axis=-1), dtype=np.float64)
