"""The scalars of a step that mirrors show, under names that put one quantity of all modules side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array
from linchain_analysis.probes import Chain, Reading
from linchain_analysis.runs.derived import derive
from linchain_analysis.tracking.observers import FinishedStep

_SPECTRA = ("spectrum", "delta_update_spectrum")
_NORMS = ("delta_norm", "delta_update_norm")
DERIVED_COLUMNS = (
    "delta_norm",
    "delta_spectral_norm",
    "effective_rank",
    "stable_rank",
    "delta_update_norm",
    "delta_update_effective_rank",
)
FACTOR_COLUMNS = ("grad_norm", "grad_cosine_previous", "update_norm", "weight_norm", "update_ratio")


class StepScalars:
    """Computes them for the chains of one run, each step once however many mirrors ask.

    Attributes:
        names: `column/module` and `column/module/factor`, in the order of the values.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.names = [
            *(f"{column}/{chain.module}" for column in (*DERIVED_COLUMNS, "descent_cosine") for chain in chains),
            *(
                f"{column}/{chain.module}/{factor.name}"
                for column in FACTOR_COLUMNS
                for chain in chains
                for factor in chain.factors
            ),
        ]
        self._step = 0
        self._values = np.zeros(0, dtype=np.float32)

    def of(self, finished: FinishedStep) -> NDArray[np.float32]:
        """Return the values of a recorded step, as `load_run` gives them; NaN where one is undefined or not taken."""
        if finished.reading is not None and finished.step != self._step:
            reading = finished.reading
            parts = [*_derived(reading), reading.descent_cosine, *(reading.factors[name] for name in FACTOR_COLUMNS)]
            with np.errstate(over="ignore", under="ignore"):  # as in the tables, whose floats are of 32 bits
                self._values = np.concatenate(parts).astype(np.float32)
            self._step = finished.step
        return self._values


def _derived(reading: Reading) -> list[Array]:
    """By the very function that computes these columns when a run is read, from spectra rounded as they are stored."""
    rows = {name: _lists(getattr(reading, f"delta_{name}" if name == "spectrum" else name)) for name in _SPECTRA}
    if all(spectrum is None for spectrum in reading.delta_spectrum):
        rows |= {name: pa.array(getattr(reading, name).astype(np.float32)) for name in _NORMS}
    found = derive(pa.table(rows), DERIVED_COLUMNS)
    return [found[name] for name in DERIVED_COLUMNS]


def _lists(spectra: Sequence[Array | None]) -> pa.Array:
    lengths = [0 if sigma is None else len(sigma) for sigma in spectra]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = [sigma for sigma in spectra if sigma is not None]
    with np.errstate(over="ignore", under="ignore"):
        values = np.concatenate(flat).astype(np.float32) if flat else np.zeros(0, dtype=np.float32)
    missing = pa.array([sigma is None for sigma in spectra], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values), mask=missing)
