"""Read gradients, updates and spectra of many chains at once: same-shape modules are stacked, one copy to the host.

Nothing here draws random numbers or writes to what it reads, and autocast is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linchain_analysis.measures.cores import Cores, norm
from linchain_analysis.measures.spectral import Array, frobenius_norm, spectrum
from linchain_analysis.probes.base import base_norms
from linchain_analysis.probes.chains import Chain, Factor
from linchain_analysis.probes.coordinates import small_chains, split_columns
from linchain_analysis.probes.groups import Group, Shelf, stack_chains
from linchain_analysis.probes.host import HostCopy
from linchain_analysis.probes.stacks import FactorStack
from linchain_analysis.probes.tokens import TokenProbe

_NAN = float("nan")


@dataclass(frozen=True)
class Wanted:
    """What is to be read.

    Attributes:
        cosines: Cosines of gradients with the last ones and with updates, for which gradients are kept.
        spectra: Spectra of delta and of its update; their Frobenius norms are read in any case.
        cores: Whether measures or snapshots need the chains in small coordinates.
        gradients: Whether these need gradients there.
        squares: Whether these need F_iᵀF_i of the start.
        base: Whether these need the norms of the frozen weights.
    """

    cosines: bool = True
    spectra: bool = True
    cores: bool = False
    gradients: bool = False
    squares: bool = False
    base: bool = False


@dataclass(frozen=True)
class Start:
    """Where training began, as far as it is needed later.

    Attributes:
        factors: The factors in chain view, by `module/factor`, of every chain whose product was not zero.
        squares: F_iᵀF_i and F_{i+1}F_{i+1}ᵀ of each pair of neighbours, by `module/i/left` and `module/i/right`;
            empty where no measure needs them.
        scales: The scales, by module.
    """

    factors: Mapping[str, NDArray[np.floating]]
    squares: Mapping[str, NDArray[np.floating]]
    scales: Mapping[str, float]


@dataclass(frozen=True)
class Reading:
    """What one step showed.

    Attributes:
        factors: `grad_norm grad_cosine_previous update_norm weight_norm update_ratio`, each (num_factor_rows,): the
            factors of the first chain, of the second, ….
        descent_cosine: (num_chains,).
        delta_spectrum, delta_update_spectrum: per chain, descending; None where delta is refused or not asked for.
        delta_norm, delta_update_norm: (num_chains,); NaN where delta is refused.
        cores: Positions of chains in the list and those chains in small coordinates, group by group; empty where
            nobody asked for them.
        offsets: Where each chain's rows begin in `factors`.
        whole_gradients: Returns the gradients of a chain by factor name, in chain view, while the step is at hand.
    """

    factors: Mapping[str, Array]
    descent_cosine: Array
    delta_spectrum: list[Array | None]
    delta_update_spectrum: list[Array | None]
    delta_norm: Array
    delta_update_norm: Array
    cores: list[tuple[NDArray[np.int_], Cores]]
    offsets: NDArray[np.int_]
    whole_gradients: Callable[[int], dict[str, NDArray[np.floating]]]

    def per_chain(self, name: str) -> list[Array]:
        """Return a column of `factors` chain by chain."""
        return np.split(self.factors[name], self.offsets[1:])


@dataclass
class _Deltas:
    """What is found of delta, group by group."""

    norms: Array
    update_norms: Array
    spectra: list[Array | None]
    update_spectra: list[Array | None]
    cores: list[tuple[NDArray[np.int_], Cores]] = field(default_factory=list)


class ChainReader:
    """Reads a fixed list of chains step by step.

    A recorded step is three calls: `read_gradients` once they are whole, unscaled and not yet clipped,
    `read_before` just before the optimiser changes the factors, `read_after` just after.

    Args:
        chains: What to read.
        wanted: What of it.
        is_trained: Whether a parameter trains; by default, whether it requires a gradient.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        wanted: Wanted | None = None,
        is_trained: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
    ) -> None:
        self.chains = list(chains)
        self.tokens = TokenProbe(self.chains, is_trained)
        self._is_trained = is_trained
        self._wanted = wanted or Wanted()
        self._copy = HostCopy()
        self._stacks: list[FactorStack] = []
        self._shelves: list[Shelf] = []
        self._groups: list[Group] = []
        self._start_squares: list[tuple[tuple[Array, Array], ...]] = []
        self._base_norms = np.full(len(self.chains), _NAN)
        lengths = [len(chain.factors) for chain in self.chains]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int) if lengths else np.zeros(0, int)
        self._num_rows = sum(lengths)

    @property
    def _keeps_gradients(self) -> bool:
        return self._wanted.cosines or self._wanted.gradients

    @torch.no_grad()
    def keep_start(self, known: Start | None = None, base_squares: Array | None = None) -> Start:
        """Remember where training begins; called before the first step.

        Args:
            known: Where it began, if it goes on from a checkpoint; else it begins now.
            base_squares: ‖W‖² of frozen weights that several processes hold together, (num_chains,).

        Returns:
            What the run folder has to keep for a training that will go on from a checkpoint. Its `factors` are empty
            where every product is zero: delta is then the product itself.
        """
        if known is None:
            starts = [chain.refused is None and not _vanishes(chain) for chain in self.chains]
        else:
            starts = [f"{chain.module}/{chain.factors[0].name}" in known.factors for chain in self.chains]
        self._stack(starts)
        if known is not None:
            self._set_start(known, starts)
        elif self._wanted.squares:
            self._start_squares = [group.squares() for group in self._groups]
        if self._wanted.base:
            self._base_norms = base_norms(self.chains, None if known is None else known.factors, base_squares)
        return known or Start(
            {
                f"{self.chains[c].module}/{factor.name}": stack.initial(j)
                for c, factor, stack, j in self._places()
                if starts[c]
            },
            {
                f"{chain.module}/{i}/{side}": square[k]
                for group, squares in zip(self._groups, self._start_squares, strict=False)
                for i, pair in enumerate(squares)
                for side, square in zip(("left", "right"), pair, strict=True)
                for k, chain in enumerate(group.chains)
            },
            {chain.module: chain.scale for chain in self.chains},
        )

    def _set_start(self, known: Start, starts: Sequence[bool]) -> None:
        for c, factor, stack, j in self._places():
            if starts[c]:
                stack.set_initial(j, known.factors[f"{self.chains[c].module}/{factor.name}"])
        for group in self._groups:
            group.initial_scales = np.array([known.scales[chain.module] for chain in group.chains])
        modules = {chain.module for group in self._groups for chain in group.chains}
        if self._wanted.squares and all(f"{module}/0/left" in known.squares for module in modules):
            self._start_squares = [
                tuple(
                    (
                        np.stack([known.squares[f"{chain.module}/{i}/left"] for chain in group.chains]),
                        np.stack([known.squares[f"{chain.module}/{i}/right"] for chain in group.chains]),
                    )
                    for i in range(group.num_factors - 1)
                )
                for group in self._groups
            ]

    def _places(self) -> list[tuple[int, Factor, FactorStack, int]]:
        """Each factor: the number of its chain, itself, its stack and its place there."""
        homes = self._homes()
        return [
            (c, factor, *homes[int(offset) + i])
            for c, (chain, offset) in enumerate(zip(self.chains, self._offsets, strict=True))
            for i, factor in enumerate(chain.factors)
        ]

    def _stack(self, starts: Sequence[bool]) -> None:
        self._stacks, self._shelves, self._groups = stack_chains(self.chains, starts, apart=self._wanted.cores)

    @torch.no_grad()
    def read_gradients(self, divisor: Tensor | float | None = None) -> None:
        """Read the gradients as they stand, divided by `divisor` (the scale of a gradient scaler)."""
        if self.chains and not self._stacks:  # nobody asked for the start: delta is the product itself
            self._stack([False] * len(self.chains))
        with _plain_arithmetic(self.chains):
            for stack in self._stacks:
                stack.read_gradients(self._copy, divisor, keep=self._keeps_gradients)

    def gradient_square(self, optimized: NDArray[np.bool_]) -> list[Tensor]:
        """Return parts of the sum of ‖g‖² just read over the factors that `optimized` marks, on their devices.

        Args:
            optimized: By rows of `factors`.
        """
        return [stack.gradient_square(optimized) for stack in self._stacks]

    @torch.no_grad()
    def read_before(self) -> None:
        """Copy the factors as they are before the step."""
        for stack in self._stacks:
            stack.read_before(keep=self._keeps_gradients)

    @torch.no_grad()
    def read_after(
        self, extra: Sequence[Tensor] = (), rates: Mapping[int, float] | None = None
    ) -> tuple[Reading, list[float]]:
        """Read the factors after the step and bring everything to the host at once.

        Args:
            extra: Further one-element tensors to bring along, such as the loss.
            rates: Learning rate by the identity of the parameter.

        Returns:
            The reading, and `extra` as numbers.
        """
        with _plain_arithmetic(self.chains), np.errstate(over="ignore", invalid="ignore"):
            for stack in self._stacks:
                stack.read_after(self._copy, gradients=self._wanted.gradients)
            values = self._copy.fetch(extra)
            reading = self._assemble(rates or {})
            self._copy.release()
        return reading, values

    @torch.no_grad()
    def bring_home(self, tensors: Sequence[Tensor]) -> list[float]:
        """Bring one-element tensors of a step that is not recorded to the host at once."""
        return HostCopy().fetch(tensors)

    # --- on the host -------------------------------------------------------------------------------------------

    def _assemble(self, rates: Mapping[int, float]) -> Reading:
        k = len(self.chains)
        found = {name: np.full(self._num_rows, _NAN) for name in ("gg", "hh", "gh", "gd", "dd", "ww", "vv")}
        present, had = np.zeros(self._num_rows, dtype=bool), np.zeros(self._num_rows, dtype=bool)
        small: dict[int, dict[str, Array]] = {}
        for stack in self._stacks:
            numbers, small[id(stack)] = stack.finish(self._copy)
            for name, values in numbers.items():
                found[name][stack.rows] = values
            present[stack.rows], had[stack.rows] = stack.has_gradient, stack.had_gradient
        factors, descent = self._factor_columns(found, present, had)
        columns = _Deltas(np.full(k, _NAN), np.full(k, _NAN), [None] * k, [None] * k)
        parts = [split_columns(shelf, small, gradients=self._wanted.gradients) for shelf in self._shelves]
        for g, group in enumerate(self._groups):
            self._fill_delta(columns, parts, present, g, group, rates)
        return Reading(
            factors=factors,
            descent_cosine=descent,
            delta_spectrum=columns.spectra,
            delta_update_spectrum=columns.update_spectra,
            delta_norm=columns.norms,
            delta_update_norm=columns.update_norms,
            cores=columns.cores,
            offsets=self._offsets,
            whole_gradients=self._whole_gradients,
        )

    def _factor_columns(
        self, found: Mapping[str, Array], present: NDArray[np.bool_], had: NDArray[np.bool_]
    ) -> tuple[dict[str, Array], Array]:
        """The columns of `factors`, and `descent_cosine` of each chain."""
        gg = np.where(present, found["gg"], _NAN)
        update_norm = np.sqrt(found["dd"])
        factors = {
            "grad_norm": np.sqrt(gg),
            "grad_cosine_previous": np.full(self._num_rows, _NAN),
            "update_norm": update_norm,
            "weight_norm": np.sqrt(found["ww"]),
            "update_ratio": _ratio(update_norm, np.sqrt(found["vv"])),
        }
        if not (self._wanted.cosines and self._num_rows):
            return factors, np.full(len(self.chains), _NAN)
        cosine = np.where(had, _cosine(found["gh"], gg, found["hh"]), _NAN)
        factors["grad_cosine_previous"] = cosine
        # A factor without a gradient adds nothing to ⟨g, dF⟩ or ‖g‖², but its update counts.
        totals = [
            np.add.reduceat(part, self._offsets)
            for part in (np.where(present, found["gd"], 0.0), np.where(present, gg, 0.0), found["dd"])
        ]
        return factors, -_cosine(*totals)

    def _fill_delta(
        self,
        columns: _Deltas,
        parts: Sequence[Mapping[str, Array]],
        present: NDArray[np.bool_],
        g: int,
        group: Group,
        rates: Mapping[int, float],
    ) -> None:
        known: dict[str, Any] = {}
        if self._wanted.cores:
            known["start_squares"] = self._start_squares[g] if self._start_squares else ()
            known["base_norm"] = self._base_norms[group.members]
            known["tokens"] = self.tokens.parts(group.members)
            known["trained"] = np.array(
                [[self._is_trained(factor.parameter) for factor in chain.factors] for chain in group.chains]
            )
            known["learning_rate"] = np.array(
                [[rates.get(id(factor.parameter), _NAN) for factor in chain.factors] for chain in group.chains]
            )
        cores = small_chains(group, parts, present, gradients=self._wanted.gradients, **known)
        if self._wanted.spectra:
            lengths = group.spectrum_lengths()
            for store, norms, core, length in (
                (columns.spectra, columns.norms, cores.short_delta, lengths[0]),
                (columns.update_spectra, columns.update_norms, cores.update, lengths[1]),
            ):
                sigma = spectrum(core)[:, :length]
                norms[group.members] = frobenius_norm(sigma)
                for member, values in zip(group.members, sigma, strict=True):
                    store[member] = values
        else:
            columns.norms[group.members] = norm(cores.short_delta)
            columns.update_norms[group.members] = norm(cores.update)
        if self._wanted.cores:
            columns.cores.append((group.members, cores))

    def _whole_gradients(self, index: int) -> dict[str, NDArray[np.floating]]:
        homes = self._homes()
        found = {}
        for i, factor in enumerate(self.chains[index].factors):
            stack, j = homes[int(self._offsets[index]) + i]
            gradient = stack.whole_gradient(j)
            if gradient is not None:
                found[factor.name] = gradient
        return found

    def _homes(self) -> dict[int, tuple[FactorStack, int]]:
        """By row of `factors`, the stack and the place there."""
        return {int(row): (stack, j) for stack in self._stacks for j, row in enumerate(stack.rows)}


def _vanishes(chain: Chain) -> bool:
    """Whether a factor of the chain is zero."""
    return any(not bool(factor.parameter.detach().any()) for factor in chain.factors)


def _cosine(dot: Array, square_a: Array, square_b: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(square_a) * np.sqrt(square_b)
        return np.asarray(np.divide(dot, norms, out=np.full(norms.shape, _NAN), where=norms > 0))


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.divide(top, bottom, out=np.full(top.shape, _NAN), where=bottom > 0))


def _plain_arithmetic(chains: Sequence[Chain]) -> torch.autocast:
    """Autocast off on the chains' device: the caller may be inside a bf16 or fp16 region."""
    device = chains[0].factors[0].parameter.device.type if chains else "cpu"
    return torch.autocast(device, enabled=False)
