"""Apply the chosen measures to what was read: rows, and snapshots of the small cores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.registry import NOISE_COLUMNS, Measure, check_values
from linchain_analysis.probes import Chain, Reading, Wanted
from linchain_analysis.runs import pack_chain
from linchain_analysis.tracking.presets import SAMPLE_EVERY, Selection
from linchain_analysis.vocabulary import columns_of

logger = logging.getLogger("linchain_analysis")

SNAPSHOT_EVERY = 50
_FIXED = {table: {column.name for column in columns_of(table)} for table in ("steps", "modules", "factors", "links")}


class Measuring:
    """The measures and snapshots of one run.

    Args:
        selection: What is measured.
        chains: The chains of the run.
        sample_every: Measures too dear for every step are taken at the first recorded step, and then at the first one
            at least so many steps later.
        snapshot_every: The same for snapshots; None for 50 with a preset that keeps them, and none otherwise.
        snapshot_budget: Bytes that snapshots may take which nobody asked for by number: half of it is used at the
            first interval, half of the rest at twice that, and so on, so that a run of any length fits.
        whole_gradients: Whether snapshots keep the gradients of A and B whole.
        strict: Whether a measure that fails raises; otherwise it is left out from then on, with a warning.
    """

    def __init__(
        self,
        selection: Selection,
        chains: Sequence[Chain],
        *,
        sample_every: int = SAMPLE_EVERY,
        snapshot_every: int | None = None,
        snapshot_budget: int | None = None,
        whole_gradients: bool = False,
        strict: bool = False,
    ) -> None:
        self.selection = selection
        self.strict = strict
        self._failed: set[str] = set()
        self.snapshot_every = SNAPSHOT_EVERY if snapshot_every is None and selection.snapshots else snapshot_every
        self._snapshot_budget = snapshot_budget if snapshot_every is None else None
        self._snapshot_bytes, self._num_thinnings = 0, 0
        self.whole_gradients = whole_gradients and self.snapshot_every is not None
        self._chains = list(chains)
        self._sample_every = sample_every
        self._last_sample: int | None = None
        self._last_snapshot: int | None = None
        self._links = [_link_names(chain) for chain in chains]
        self._counts = {  # rows of each chain, by table
            "modules": [1] * len(self._chains),
            "factors": [len(chain.factors) for chain in self._chains],
            "links": [len(links) for links in self._links],
        }
        self._offsets = {table: np.concatenate([[0], np.cumsum(n)]).astype(int) for table, n in self._counts.items()}

    @property
    def wanted(self) -> Wanted:
        """What the probes have to read."""
        chosen, snapshots = self.selection, self.snapshot_every is not None
        return Wanted(
            cosines=chosen.cosines,
            spectra=chosen.spectra,
            cores=bool(chosen.measures) or snapshots,
            gradients=chosen.needs("gradients") or snapshots,
            squares=chosen.needs("start") or snapshots,
            base=chosen.needs("base"),
        )

    def columns(self) -> dict[str, list[list[str]]]:
        """Per table, name and kind of each column that the measures add, for the manifest."""
        added: dict[str, list[list[str]]] = {}
        if self.selection.noise:
            added["steps"] = [[column.name, column.kind] for column in NOISE_COLUMNS]
        for measure in self.selection.measures:
            for column in measure.columns:
                if column.name not in _FIXED[column.table]:
                    added.setdefault(column.table, []).append([column.name, column.kind])
        return added

    def go_on(self, recorded: Sequence[int], snapshot_sizes: Mapping[int, int]) -> None:
        """Sample and keep snapshots as if this had seen the steps of a run that goes on.

        Args:
            recorded: Its steps that were recorded whole.
            snapshot_sizes: Bytes of its snapshots, by step.
        """
        for step in recorded:
            if self.samples(step):
                self._last_sample = step
            if self._keeps_snapshot(step):
                self._last_snapshot = step
                self._fits(snapshot_sizes.get(step, 0))

    def samples(self, step: int) -> bool:
        """Whether dear measures are taken at `step`, if it is recorded."""
        return self._last_sample is None or step - self._last_sample >= self._sample_every

    def looks_at_tokens(self, step: int) -> bool:
        """Whether the backward pass of `step` has to be looked at, if it is recorded."""
        return self.selection.needs("tokens") and self.samples(step)

    def rows(self, step: int, reading: Reading) -> dict[str, dict[str, Any]]:
        """Return by table the columns that the measures add to the rows of `step`, in the order of their rows.

        `links` is returned whole, since nothing else has rows there; it is missing where no measure has links.
        """
        sampled = self.samples(step)
        if sampled:
            self._last_sample = step
        tables: dict[str, dict[str, Any]] = {"modules": {}, "factors": {}, "links": {}}
        for measure in self.selection.measures:
            if (measure.sampled and not sampled) or measure.name in self._failed:
                continue
            try:
                self._take(measure, reading, tables)
            except Exception as error:  # one measure of many, perhaps the user's own
                if self.strict:
                    raise
                self._failed.add(measure.name)
                logger.warning(
                    "tracker: the measure %s is left out from step %d on (%s: %s).",
                    measure.name,
                    step,
                    type(error).__name__,
                    error,
                )
        if tables["links"]:
            modules = [chain.module for chain, links in zip(self._chains, self._links, strict=True) for _ in links]
            links = [link for links in self._links for link in links]
            tables["links"] |= {"step": np.full(len(links), step), "module": modules, "link": links}
        return tables

    def snapshot(self, step: int, reading: Reading) -> dict[str, Any] | None:
        """Return the rows of a snapshot where one is due, or None."""
        if not self._keeps_snapshot(step) or not reading.cores:
            return None
        self._last_snapshot = step
        packed: list[tuple[int, bytes]] = []
        for members, cores in reading.cores:
            for j, member in enumerate(members):
                whole = reading.whole_gradients(int(member)) if self.whole_gradients else None
                packed.append((int(member), pack_chain(cores, j, whole)))
        packed.sort()
        if not self._fits(sum(len(data) for _, data in packed)):
            return None
        return {
            "step": np.full(len(packed), step),
            "module": [self._chains[member].module for member, _ in packed],
            "tensors": [data for _, data in packed],
        }

    def _keeps_snapshot(self, step: int) -> bool:
        """Whether a snapshot is due at `step`, if it is recorded."""
        if self.snapshot_every is None:
            return False
        interval = self.snapshot_every * 2**self._num_thinnings
        return self._last_snapshot is None or step - self._last_snapshot >= interval

    def _fits(self, size: int) -> bool:
        """Count `size` bytes of a snapshot against the budget, and tell whether they fit."""
        budget = self._snapshot_budget
        if budget is None:
            return True
        if self._snapshot_bytes + size > budget:
            return False
        self._snapshot_bytes += size
        if self._snapshot_bytes > budget * (1 - 0.5 ** (self._num_thinnings + 1)):
            self._num_thinnings += 1
        return True

    def _take(self, measure: Measure, reading: Reading, tables: dict[str, dict[str, Any]]) -> None:
        for members, cores in reading.cores:
            values = measure.function(cores)
            for column in measure.columns:
                name, num_rows = column.name, int(self._offsets[column.table][-1])
                value = check_values(measure, name, values, column.table, cores)
                rows = _row_numbers(self._offsets[column.table], members, self._counts[column.table])
                whole = tables[column.table].get(name)
                if column.kind in ("spectrum", "values"):
                    if whole is None:
                        whole = tables[column.table][name] = [None] * num_rows
                    for row, entry in zip(rows, value.reshape(len(rows), -1), strict=True):
                        whole[row] = entry
                else:
                    if whole is None:
                        whole = np.full(num_rows, np.nan)
                        tables[column.table][name] = whole
                    whole[rows] = value.reshape(-1)


def _row_numbers(offsets: NDArray[np.int_], members: NDArray[np.int_], counts: Sequence[int]) -> NDArray[np.int_]:
    """Rows of these chains, chain by chain; chains of one group have equally many."""
    return (offsets[members][:, None] + np.arange(counts[int(members[0])])).ravel()


def _link_names(chain: Chain) -> list[str]:
    return [f"{left.name}-{right.name}" for left, right in pairwise(chain.factors)] if chain.refused is None else []
