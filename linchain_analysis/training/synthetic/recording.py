"""What a tracker would write of each chain of a stack, of all chains at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.balance import squares
from linchain_analysis.measures.cores import Cores, TokenParts, cosine, norm, ratio
from linchain_analysis.measures.registry import NOISE_COLUMNS, Measure, check_values
from linchain_analysis.measures.spectral import spectrum
from linchain_analysis.problems.synthetic import LinearMaps
from linchain_analysis.runs import pack_chain
from linchain_analysis.tracking.presets import SAMPLE_EVERY, Selection
from linchain_analysis.training.synthetic.batch import ChainStack, Moment
from linchain_analysis.training.synthetic.small_cores import reduce_chains
from linchain_analysis.training.synthetic.tokens import look_at_inputs
from linchain_analysis.vocabulary import columns_of

Floats = NDArray[np.float64]
SNAPSHOT_EVERY = 50
_FIXED = {table: {column.name for column in columns_of(table)} for table in ("modules", "factors", "links")}
_OF_FACTORS = ("update_norm", "weight_norm", "update_ratio", "grad_norm", "grad_cosine_previous")
_OF_DELTA = ("spectrum", "delta_update_spectrum"), ("delta_norm", "delta_update_norm")
_DENSE_STEPS = 20  # the start, where most happens, is recorded whole
_LATER_RECORDS = 60


def choose_steps(every: int | str, num_steps: int) -> NDArray[np.int64]:
    """Return the steps that are recorded: n, 2 n, …, or with `auto` the first 20, about 60 more and the last."""
    if isinstance(every, int):
        return np.arange(every, num_steps + 1, every, dtype=np.int64)
    dense = np.arange(1, min(_DENSE_STEPS, num_steps) + 1)
    later = np.geomspace(_DENSE_STEPS, max(num_steps, _DENSE_STEPS), _LATER_RECORDS + 1).round()
    return np.unique(np.concatenate([dense, later[later <= num_steps], [num_steps]])).astype(np.int64)


def spaced_steps(recorded: NDArray[np.int64], interval: int) -> NDArray[np.bool_]:
    """Tell which recorded steps are sampled: the first, and then the first at least `interval` later."""
    kept, last = np.zeros(len(recorded), dtype=bool), -math.inf
    for t, step in enumerate(recorded):
        if step - last >= interval:
            kept[t], last = True, step
    return kept


def added_columns(selection: Selection) -> dict[str, list[list[str]]]:
    """Per table, name and kind of each column that the measures add, for the manifest."""
    added: dict[str, list[list[str]]] = {}
    if selection.noise:  # undefined in steps of one backward pass, and so left empty
        added["steps"] = [[column.name, column.kind] for column in NOISE_COLUMNS]
    for measure in selection.measures:
        for column in measure.columns:
            if column.name not in _FIXED[column.table]:
                added.setdefault(column.table, []).append([column.name, column.kind])
    return added


class StackRecorder:
    """Takes the rows of `modules`, `factors`, `links` and `snapshots` of every chain of one stack.

    Rows of steps that a chain did not live to see are NaN, as those of a model that has diverged.

    Args:
        problem: What is learned.
        stack: The chains, as they start.
        selection: What is recorded.
        recorded: (T,), at which steps.
    """

    def __init__(
        self, problem: LinearMaps, stack: ChainStack, selection: Selection, recorded: NDArray[np.int64]
    ) -> None:
        self._problem, self._stack, self._selection = problem, stack, selection
        self.recorded = recorded
        self._sampled = spaced_steps(recorded, SAMPLE_EVERY)
        self._sparse = {column.name for m in selection.measures if m.sampled for column in m.columns}
        self._snapped = spaced_steps(recorded, SNAPSHOT_EVERY) & selection.snapshots
        self._places = {int(step): t for t, step in enumerate(recorded)}
        self._trained = stack.trains
        self._rates = np.where(self._trained, stack.rates, np.nan)
        self._gradients = [np.full(factor.shape, np.nan) for factor in stack.factors]
        self._columns: dict[str, dict[str, NDArray[np.float32]]] = {"modules": {}, "factors": {}, "links": {}}
        self._snapshots: list[list[tuple[int, bytes]]] = [[] for _ in range(len(stack))]
        start = tuple(stack.factors)
        self._squares = tuple(squares(start, i) for i in range(len(start) - 1)) if selection.needs("start") else ()
        self._lengths = self._spectrum_lengths()
        if len(recorded):
            self._make_columns()

    def records(self, step: int) -> bool:
        """Whether `step` is recorded."""
        return step in self._places

    def observe(self, moment: Moment) -> None:
        """Take one recorded step of some chains."""
        t, chains = self._places[moment.step], moment.chains
        change = [new - old for new, old in zip(moment.after, moment.before, strict=True)]
        with np.errstate(over="ignore", invalid="ignore"):
            self._take_factors(t, moment, change)
            cores = self._reduce(moment, change, gradients=bool(self._snapped[t]), tokens=bool(self._sampled[t]))
            self._take_delta(t, chains, cores)
            for measure in self._selection.measures:
                if self._sampled[t] or not measure.sampled:
                    self._take_measure(t, chains, cores, measure)
        if self._snapped[t]:
            for j, chain in enumerate(chains):
                self._snapshots[chain].append((moment.step, pack_chain(cores, j)))

    def tables(self, chain: int) -> dict[str, dict[str, Any]]:
        """Return the columns of one chain by table, as the tables of a run take them."""
        counts = {"modules": 1, "factors": len(self._trained), "links": len(self._trained) - 1}
        found: dict[str, dict[str, Any]] = {}
        for table, columns in self._columns.items():
            if not columns or not len(self.recorded):
                continue
            rows = counts[table]
            found[table] = {
                "step": np.repeat(self.recorded, rows).astype(np.int32),
                "module": np.zeros(len(self.recorded) * rows, dtype=np.int32),
                **{name: self._rows(table, name, values[chain]) for name, values in columns.items()},
            }
        if "factors" in found:
            found["factors"]["factor"] = np.tile(np.arange(counts["factors"], dtype=np.int32), len(self.recorded))
        if "links" in found:
            names = name_factors(len(self._trained))
            links = [f"{left}-{right}" for left, right in pairwise(names)]
            found["links"]["link"] = links * len(self.recorded)
        if self._snapshots[chain]:
            steps, packed = zip(*self._snapshots[chain], strict=True)
            found["snapshots"] = {
                "step": np.array(steps, dtype=np.int32),
                "module": np.zeros(len(steps), dtype=np.int32),
                "tensors": list(packed),
            }
        return found

    def _reduce(self, moment: Moment, change: Sequence[Floats], *, gradients: bool, tokens: bool) -> Cores:
        """Chains in small coordinates, with gradients where a measure needs them too, and tokens only if so."""
        chosen, chains = self._selection, moment.chains
        return reduce_chains(
            moment.before,
            change,
            moment.gradients if gradients or chosen.needs("gradients") else None,
            self._stack.scale,
            trained=self._trained,
            learning_rate=self._rates[chains],
            base_norm=np.zeros(len(chains)) if chosen.needs("base") else None,
            start_squares=tuple((left[chains], right[chains]) for left, right in self._squares),
            tokens=self._look_at_inputs(moment) if tokens and chosen.needs("tokens") else None,
        )

    def _make_columns(self) -> None:
        """Make every column, so that a chain that lives to see no recorded step has the tables of any other.

        How long the spectra of a measure are is known from what it says of one chain of zeros.
        """
        for name in _OF_FACTORS:
            self._column("factors", name, (len(self._trained),))
        self._column("modules", "descent_cosine")
        for name, norm_name, length in zip(*_OF_DELTA, self._lengths, strict=True):
            if self._selection.spectra:
                self._column("modules", name, (length,))
            else:
                self._column("modules", norm_name)
        zeros = [np.zeros((1, *factor.shape[1:])) for factor in self._stack.factors]
        moment = Moment(1, np.zeros(1, dtype=np.intp), zeros, zeros, zeros)
        with np.errstate(all="ignore"):
            cores = self._reduce(moment, zeros, gradients=True, tokens=True)
            for measure in self._selection.measures:
                values = measure.function(cores)
                for column in measure.columns:
                    value = check_values(measure, column.name, values, column.table, cores)
                    self._column(column.table, column.name, value.shape[1:])

    def _look_at_inputs(self, moment: Moment) -> TokenParts:
        return look_at_inputs(
            self._problem.at_step(moment.step),
            self._stack.index[moment.chains],
            moment.before,
            moment.gradients,
            self._stack.scale,
            self._trained,
        )

    def _take_factors(self, t: int, moment: Moment, change: Sequence[Floats]) -> None:
        chains = moment.chains
        for i, (train, old, new, step, gradient) in enumerate(
            zip(self._trained, moment.before, moment.after, change, moment.gradients, strict=True)
        ):
            moved = norm(step)
            values = {
                "update_norm": moved,
                "weight_norm": norm(new),
                "update_ratio": ratio(moved, norm(old)),
                "grad_norm": norm(gradient) if train else np.full(len(chains), np.nan),
                "grad_cosine_previous": np.full(len(chains), np.nan),
            }
            if self._selection.cosines and train:
                values["grad_cosine_previous"] = cosine(gradient, self._gradients[i][chains])
                self._gradients[i][chains] = gradient
            for name, value in values.items():
                self._column("factors", name, (len(self._trained),))[chains, t, i] = value
        if self._selection.cosines:
            # A factor without a gradient adds nothing to ⟨g, dF⟩ or ‖g‖², but its update counts.
            gradients = [
                gradient if train else np.zeros_like(gradient)
                for gradient, train in zip(moment.gradients, self._trained, strict=True)
            ]
            descent = -cosine(_flatten(gradients), _flatten(change))
        else:
            descent = np.full(len(chains), np.nan)
        self._column("modules", "descent_cosine")[chains, t] = descent

    def _take_delta(self, t: int, chains: NDArray[np.intp], cores: Cores) -> None:
        found = cores.short_delta, cores.update
        for name, norm_name, core, length in zip(*_OF_DELTA, found, self._lengths, strict=True):
            if self._selection.spectra:
                self._column("modules", name, (length,))[chains, t] = spectrum(core)[:, :length]
            else:
                self._column("modules", norm_name)[chains, t] = norm(core)

    def _take_measure(self, t: int, chains: NDArray[np.intp], cores: Cores, measure: Measure) -> None:
        values = measure.function(cores)
        for column in measure.columns:
            value = check_values(measure, column.name, values, column.table, cores)
            self._column(column.table, column.name, value.shape[1:])[chains, t] = value

    def _column(self, table: str, name: str, shape: tuple[int, ...] = ()) -> NDArray[np.float32]:
        """The values of a column, (K, T, *shape)."""
        columns = self._columns[table]
        if name not in columns:
            columns[name] = np.full((len(self._stack), len(self.recorded), *shape), np.nan, dtype=np.float32)
        return columns[name]

    def _rows(self, table: str, name: str, values: NDArray[np.float32]) -> Any:
        """Rows of one chain, step by step; null in steps for which a measure is too dear."""
        depth = 1 if table == "modules" else 2
        rows = values.reshape(-1, *values.shape[depth:])
        if rows.ndim == 1 or name not in self._sparse:
            return rows
        kept = np.repeat(self._sampled, len(rows) // len(self.recorded))
        return [row if keep else None for row, keep in zip(rows, kept, strict=True)]

    def _spectrum_lengths(self) -> tuple[int, int]:
        """How many singular values delta and its update can have."""
        d_in, d_out = self._problem.shape
        width = min(factor.shape[-1] for factor in self._stack.factors[:-1])
        return min(width, d_in, d_out), min(2 * width, d_in, d_out)


def name_factors(count: int) -> list[str]:
    """Return A, W1, …, Wn, B for that many factors."""
    return ["A", *(f"W{i}" for i in range(1, count - 1)), "B"]


def _flatten(parts: Sequence[Floats]) -> Floats:
    """All numbers of each chain as one matrix of one row, (k, 1, N)."""
    return np.concatenate([part.reshape(len(part), 1, -1) for part in parts], axis=2)
