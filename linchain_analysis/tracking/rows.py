"""Rows of the tables `modules` and `factors` from one reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from linchain_analysis.probes import Chain, Reading
from linchain_analysis.runs import ModuleRecord


def module_records(chains: Sequence[Chain]) -> tuple[ModuleRecord, ...]:
    """Return the manifest's module table."""
    return tuple(
        ModuleRecord(
            module=chain.module,
            kind=chain.kind,
            layer=chain.layer,
            adapter=chain.adapter,
            d_in=chain.factors[0].shape[0],
            d_out=chain.factors[-1].shape[1],
            scale=chain.scale,
            factors=tuple((factor.name, factor.shape) for factor in chain.factors),
            refused=chain.refused,
        )
        for chain in chains
    )


class RowMaker:
    """Makes the rows of each step of the same chains.

    Args:
        chains: The chains in the order of the manifest's module table.
        factor_numbers: The number of each name of a factor (`RunWriter.numbers`).
    """

    def __init__(self, chains: Sequence[Chain], factor_numbers: dict[str, int]) -> None:
        self._num_modules = len(chains)
        lengths = [len(chain.factors) for chain in chains]
        # Names are stored as numbers; looking 200 of them up in every step would cost more than writing them.
        self._modules = np.arange(len(chains), dtype=np.int32)
        self._modules_of_factors = np.repeat(self._modules, lengths)
        names = [factor.name for chain in chains for factor in chain.factors]
        self._factors = np.array([factor_numbers[name] for name in names], dtype=np.int32)

    def module_rows(self, step: int, reading: Reading) -> dict[str, Any]:
        """Return the columns of one step of `modules`; norms by themselves only where no spectrum says them."""
        norms = {}
        if all(spectrum is None for spectrum in reading.delta_spectrum):
            norms = {"delta_norm": reading.delta_norm, "delta_update_norm": reading.delta_update_norm}
        return {
            "step": np.full(self._num_modules, step, dtype=np.int32),
            "module": self._modules,
            "spectrum": reading.delta_spectrum,
            "delta_update_spectrum": reading.delta_update_spectrum,
            "descent_cosine": reading.descent_cosine,
            **norms,
        }

    def factor_rows(self, step: int, reading: Reading) -> dict[str, Any]:
        """Return the columns of one step of `factors`."""
        return {
            "step": np.full(len(self._factors), step, dtype=np.int32),
            "module": self._modules_of_factors,
            "factor": self._factors,
            **reading.factors,
        }
