"""Read a live model: any LoRA-like adapter as a chain, its factors and gradients reduced to small cores."""

from linchain_analysis.probes.chains import Chain, Factor, choose_chains, find_chains
from linchain_analysis.probes.methods import name_method
from linchain_analysis.probes.reading import ChainReader, Reading, Start, Wanted

__all__ = [
    "Chain",
    "ChainReader",
    "Factor",
    "Reading",
    "Start",
    "Wanted",
    "choose_chains",
    "find_chains",
    "name_method",
]
