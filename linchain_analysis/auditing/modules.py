"""The table of an audit: one row per adapter and adapted matrix, from its factors alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.auditing.saved import SavedAdapter, SavedChain
from linchain_analysis.auditing.spectra import Decomposition, decompose
from linchain_analysis.measures.conditioning import measure_conditioning
from linchain_analysis.measures.registry import all_measures
from linchain_analysis.measures.spectral import Array, effective_rank, frobenius_norm, spectral_norm, stable_rank

UNUSED_SHARE = 1e-3  # of the median norm: below it a matrix is nearly unused

# Formulas are those of the same columns of a run, in `vocabulary.py` and beside the measures.
_OF_SPECTRUM = {
    "delta_norm": frobenius_norm,
    "delta_spectral_norm": spectral_norm,
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
}
Extra = Callable[[SavedChain, Sequence[Array], Decomposition], dict[str, Any]]


def tabulate_modules(
    adapters: Sequence[SavedAdapter], *, unused_share: float = UNUSED_SHARE, measure_more: Extra | None = None
) -> pd.DataFrame:
    """Measure every adapted matrix of every adapter.

    Where delta is refused, its columns are NaN, `spectrum` is None, and `product_spectrum` holds the singular values
    of the saved product under that name; elsewhere `product_spectrum` is None.

    Args:
        adapters: What to measure.
        unused_share: A matrix whose norm is below this share of the median of the adapter's norms above 0 is called
            nearly unused.
        measure_more: Returns further columns of a matrix whose delta is not refused.
    """
    rows = []
    for adapter in adapters:
        for chain in adapter.chains:
            factors = adapter.read(chain)
            found = decompose(factors, chain.scale, chain.epsilon)
            row = {"adapter": adapter.name, **_describe(chain), **_measure(chain, found)}
            if measure_more is not None and chain.refused is None:
                row |= measure_more(chain, factors, found)
            rows.append(row)
    table = pd.DataFrame(rows)
    if len(table):
        table["layer"] = table["layer"].astype("Int64")
        table["refused"] = table["refused"].astype("string")
        table.insert(4, "state", _find_states(table, unused_share))
    return table


def summarise_kinds(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per adapter and kind of module: counts, and medians over the matrices that are used."""
    rows = []
    for (adapter, kind), group in table.groupby(["adapter", "kind"], sort=False):
        used = group[group["state"] == "used"]
        norms = group["delta_norm"].to_numpy(dtype=np.float64)
        row: dict[str, Any] = {
            "adapter": adapter,
            "kind": kind,
            "modules": len(group),
            "unused": int(group["state"].isin(["unused", "nearly unused"]).sum()),
            "total_norm": float(np.sqrt(np.sum(norms**2))),
        }
        for name in ("delta_norm", "effective_rank", "stable_rank", "numerical_rank", "participation_ratio"):
            row[f"median_{name}"] = float(used[name].median()) if len(used) else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)


def _describe(chain: SavedChain) -> dict[str, Any]:
    return {
        "module": chain.module,
        "kind": chain.kind,
        "layer": chain.layer,
        "d_in": chain.size[0],
        "d_out": chain.size[1],
        "rank_bound": chain.rank_bound,
        "chain_length": len(chain.factors) - 2,
        "scale": chain.scale,
        "refused": chain.refused,
    }


def _measure(chain: SavedChain, found: Decomposition) -> dict[str, Any]:
    sigma = found.sigma
    spectral = {
        name: measure.function
        for name, measure in all_measures().items()
        if measure.level == "reading" and measure.source == "spectrum"
    }
    row = {name: float(np.asarray(function(sigma))) for name, function in (_OF_SPECTRUM | spectral).items()}
    conditions = measure_conditioning(found.cores)
    row["numerical_rank"] = float(found.rank) if found.is_finite else float("nan")
    row["chain_condition"] = float(conditions["chain_condition"][0])
    if chain.refused is not None:
        row = dict.fromkeys(row, float("nan"))
    return {
        "spectrum": sigma if chain.refused is None else None,
        "product_spectrum": None if chain.refused is None else sigma,
        **row,
        "rank_cut_off": found.cut_off,
        "factors": [name for name, _ in chain.factors],
        "factor_condition": _per_factor(chain, conditions["condition"][0]),
    }


def _per_factor(chain: SavedChain, values: Any) -> Any:
    return values if len(values) == len(chain.factors) else np.full(len(chain.factors), np.nan)


def _find_states(table: pd.DataFrame, unused_share: float) -> list[str]:
    medians = {
        adapter: float(np.median(norms[norms > 0])) if (norms > 0).any() else float("nan")
        for adapter, group in table.groupby("adapter", sort=False)
        for norms in [group["delta_norm"].to_numpy(dtype=np.float64)]
    }
    states = []
    for adapter, refused, norm in zip(table["adapter"], table["refused"], table["delta_norm"], strict=True):
        if not pd.isna(refused):
            states.append("refused")
        elif not np.isfinite(norm):
            states.append("not finite")
        elif norm == 0:
            states.append("unused")
        else:
            states.append("nearly unused" if norm < unused_share * medians[adapter] else "used")
    return states
