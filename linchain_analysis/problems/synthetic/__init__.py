"""Linear maps to learn, whose optimum is known: rotations, shears, chosen spectra, noisy and partial data."""

from linchain_analysis.problems.synthetic.maps import LinearMaps
from linchain_analysis.problems.synthetic.setting import MAP_NAMES, MapSetting

__all__ = ["MAP_NAMES", "LinearMaps", "MapSetting"]
