"""Size of delta and of its update beside the frozen weight."""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.cores import Cores, norm, ratio
from linchain_analysis.measures.registry import Values, measure
from linchain_analysis.vocabulary import Column


@measure(
    Column(
        "modules",
        "relative_delta",
        "float",
        "1",
        "‖ΔW‖/‖W_0‖, W_0 the weight when training began; NaN where W_0 cannot be read as numbers (quantised)",
        "",
    ),
    Column(
        "modules",
        "relative_update",
        "float",
        "1",
        "‖dΔW‖/‖W_0‖; NaN where W_0 cannot be read as numbers (quantised)",
        "",
        basis="update",
    ),
    needs=["base"],
)
def measure_relative_size(cores: Cores) -> Values:
    """Divide the norms of delta and of its update by that of the frozen weight."""
    base = np.full(len(cores), np.nan) if cores.base_norm is None else cores.base_norm
    return {"relative_delta": ratio(norm(cores.delta), base), "relative_update": ratio(norm(cores.update), base)}
