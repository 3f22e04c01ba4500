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


def module_rows(step: int, chains: Sequence[Chain], reading: Reading) -> dict[str, Any]:
    """Return the columns of one step of `modules`; norms by themselves only where no spectrum says them."""
    norms = {}
    if all(spectrum is None for spectrum in reading.delta_spectrum):
        norms = {"delta_norm": reading.delta_norm, "delta_update_norm": reading.delta_update_norm}
    return {
        "step": np.full(len(chains), step),
        "module": [chain.module for chain in chains],
        "spectrum": reading.delta_spectrum,
        "delta_update_spectrum": reading.delta_update_spectrum,
        "descent_cosine": reading.descent_cosine,
        **norms,
    }


def factor_rows(step: int, chains: Sequence[Chain], reading: Reading) -> dict[str, Any]:
    """Return the columns of one step of `factors`."""
    modules = [chain.module for chain in chains for _ in chain.factors]
    return {
        "step": np.full(len(modules), step),
        "module": modules,
        "factor": [factor.name for chain in chains for factor in chain.factors],
        **reading.factors,
    }
