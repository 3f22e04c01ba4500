"""Train whole stacks of chains on linear maps at once, and write them as ordinary runs. No torch in here."""

from linchain_analysis.training.synthetic.execution import run_map_grid
from linchain_analysis.training.synthetic.grid import (
    ADAM_RATES,
    DEFAULT_METHODS,
    GD_RATES,
    QUARTIC_GD_RATES,
    MapGrid,
    MapRunSettings,
    default_methods,
    default_rates,
)
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

__all__ = [
    "ADAM_RATES",
    "DEFAULT_METHODS",
    "GD_RATES",
    "QUARTIC_GD_RATES",
    "MapGrid",
    "MapRunSettings",
    "OptimizerSettings",
    "default_methods",
    "default_rates",
    "run_map_grid",
]
