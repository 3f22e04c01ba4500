"""Name groups of modules and factors in a few words, however many there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.probes import Chain

Mask = NDArray[np.bool_]

_MOST_KINDS, _MOST_RANGES, _MOST_PATTERNS = 3, 3, 2
_MOST_KEPT = 15


class Subjects:
    """Names sets of the modules of one run, and of their factors.

    Args:
        chains: The modules in the order of the model.

    Attributes:
        names: Of the modules.
        module_of: By row of the table `factors`, the number of its module.
        offsets: By module, its first row.
        lengths: By module, how many rows it has.
        factor_names: By row, the name of the factor.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.names = [chain.module for chain in chains]
        self.lengths = np.array([len(chain.factors) for chain in chains], dtype=int)
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.module_of = np.repeat(np.arange(len(chains)), self.lengths)
        self.factor_names = [factor.name for chain in chains for factor in chain.factors]
        self._named: dict[bytes, str] = {}
        # Where a layer has several adapters, each is a kind of its own: `q_proj@other`.
        kinds = [chain.kind + "".join(chain.module.partition("@")[1:]) for chain in chains]
        self._kinds = np.array(kinds, dtype=object)
        self._layers = np.array([-1 if chain.layer is None else chain.layer for chain in chains], dtype=int)

    def modules_where_all(self, rows: Mask) -> Mask:
        """Which modules have all of their factors among `rows`."""
        return np.logical_and.reduceat(rows, self.offsets) if len(self.names) else np.zeros(0, dtype=bool)

    def first(self, rows: Mask) -> str:
        """Name the first of `rows` in the order of the model."""
        row = int(np.flatnonzero(rows)[0])
        return f"{self.factor_names[row]} of {self.names[self.module_of[row]]}"

    def factors(self, rows: Mask) -> str:
        """Name `rows`, of which there is at least one: `A of all 24 v_proj`, or the modules alone where all are."""
        key = rows.tobytes()
        if key not in self._named:  # a finding that holds is named again and again
            self._named = {key: self._name_factors(rows), **dict(list(self._named.items())[:_MOST_KEPT])}
        return self._named[key]

    def _name_factors(self, rows: Mask) -> str:
        patterns: dict[tuple[str, ...], Mask] = {}
        for module in np.unique(self.module_of[rows]):
            start, length = self.offsets[module], self.lengths[module]
            chosen = rows[start : start + length]
            names = [
                name for name, inside in zip(self.factor_names[start : start + length], chosen, strict=True) if inside
            ]
            others = [name for name in self.factor_names[start : start + length] if name not in names]
            if len(names) > 2 and len(others) == 1:
                names = [f"every factor but {others[0]}"]
            key = tuple(names) if others else ()
            patterns.setdefault(key, np.zeros(len(self.names), dtype=bool))[module] = True
        if len(patterns) > _MOST_PATTERNS or any(len(names) > 3 for names in patterns):
            some = np.logical_or.reduce(list(patterns.values()))
            return f"{int(rows.sum())} factors of {self.modules(some)}"
        return "; ".join(
            f"{_listed(names)} of {self.modules(mask)}" if names else self.modules(mask)
            for names, mask in patterns.items()
        )

    def modules(self, chosen: Mask) -> str:
        """Name modules, of which there is at least one: `all 24 v_proj`, `q_proj of layers 0–3`, or by the first."""
        total, count = len(self.names), int(chosen.sum())
        if count == 1:
            return self.names[int(np.flatnonzero(chosen)[0])]
        if count == total:
            return f"all {total} modules"
        kinds = list(dict.fromkeys(self._kinds[chosen]))
        same_kinds = np.isin(self._kinds, kinds)
        if len(kinds) <= _MOST_KINDS and same_kinds.sum() == count:
            return _listed([f"all {int((self._kinds == kind).sum())} {kind}" for kind in kinds])
        layers = np.unique(self._layers[chosen])
        ranges = _ranges(layers)
        # A name is only good if it means exactly these: T5 has a layer 0 in its encoder and one in its decoder.
        same_layers = np.isin(self._layers, layers)
        if layers[0] >= 0 and len(ranges) <= _MOST_RANGES:
            where = f"layer{'s' if len(layers) > 1 else ''} {_listed(ranges)}"
            if same_layers.sum() == count:
                return f"all {count} modules of {where}"
            if len(kinds) <= _MOST_KINDS and (same_layers & same_kinds).sum() == count:
                return f"{_listed(kinds)} of {where}"
        return f"{count} of {total} modules, first {self.names[int(np.flatnonzero(chosen)[0])]}"


def _ranges(numbers: NDArray[np.int_]) -> list[str]:
    """0 1 2 3 7 as `0–3` and `7`."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
