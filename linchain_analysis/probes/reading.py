"""Read gradients, updates and spectra of many chains at once: same-shape modules are stacked, one copy to the host.

Legend: k modules of one shape; (p, q) a factor as it is stored; (k, p, q) a stack. All arithmetic is in float64,
with autocast off; nothing here draws random numbers or writes to what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linchain_analysis.measures.chains import chain_core, update_core
from linchain_analysis.measures.spectral import Array, frobenius_norm, spectrum
from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.groups import Group, group_chains
from linchain_analysis.probes.host import HostCopy
from linchain_analysis.probes.reduction import triangular_factor

_NAN = float("nan")


@dataclass(frozen=True)
class Reading:
    """What one step showed, one entry per chain and, within it, per factor.

    Attributes:
        grad_norm, grad_cosine_previous, update_norm, weight_norm, update_ratio: per chain, (num_factors,).
        descent_cosine: (num_chains,).
        delta_spectrum, delta_update_spectrum: per chain, descending; None where delta is refused or not asked for.
        delta_norm, delta_update_norm: (num_chains,); NaN where delta is refused.
    """

    grad_norm: list[Array]
    grad_cosine_previous: list[Array]
    update_norm: list[Array]
    weight_norm: list[Array]
    update_ratio: list[Array]
    descent_cosine: Array
    delta_spectrum: list[Array | None]
    delta_update_spectrum: list[Array | None]
    delta_norm: Array
    delta_update_norm: Array


class ChainReader:
    """Reads a fixed list of chains step by step.

    A recorded step is three calls: `read_gradients` once they are whole, unscaled and not yet clipped,
    `read_before` just before the optimiser changes the factors, `read_after` just after.

    Args:
        chains: What to read.
        cosines: Whether to keep gradients for the cosines.
        spectra: Whether to take spectra; their Frobenius norms are read in any case.
    """

    def __init__(self, chains: Sequence[Chain], *, cosines: bool = True, spectra: bool = True) -> None:
        self.chains = list(chains)
        self._cosines = cosines
        self._spectra = spectra
        self._groups = group_chains(self.chains)
        self._numbers: dict[tuple[int, int, str], int] = {}
        self._copy = HostCopy()

    @torch.no_grad()
    def keep_initial(self) -> dict[str, NDArray[np.floating]]:
        """Remember the factors of every chain whose product is not zero now, as the point delta is measured from.

        Returns:
            Those factors in chain view, keyed `module/factor`, for the run folder; empty where every product is zero.
        """
        kept: dict[str, NDArray[np.floating]] = {}
        for group in self._groups:
            if not group.has_delta:
                continue
            stacks = [group.stack(i) for i in range(group.num_factors)]
            vanishes = torch.stack([(stack == 0).flatten(1).all(dim=1) for stack in stacks]).any(dim=0)
            if bool(vanishes.all()):
                continue
            group.initial, group.initial_scales = stacks, group.scales()
            for j, chain in enumerate(group.chains):
                for factor, stack in zip(chain.factors, stacks, strict=True):
                    stored = stack[j].T if factor.transposed else stack[j]
                    wide = stored if stored.dtype.itemsize >= 4 else stored.float()
                    kept[f"{chain.module}/{factor.name}"] = wide.contiguous().cpu().numpy()
        return kept

    @torch.no_grad()
    def read_gradients(self, divisor: Tensor | float | None = None) -> None:
        """Read the gradients as they stand, divided by `divisor` (the scale of a gradient scaler)."""
        self._copy, self._numbers = HostCopy(), {}
        with _plain_arithmetic(self.chains):
            for g, group in enumerate(self._groups):
                group.gradients, group.has_gradient = [], []
                for i in range(group.num_factors):
                    gradient, present = group.stack_gradients(i, divisor)
                    group.gradients.append(gradient if self._cosines else None)  # only cosines need it again
                    group.has_gradient.append(present)
                    if gradient is None:
                        continue
                    wide = gradient.double()
                    self._add(g, i, "gg", _dot(wide, wide))
                    previous = group.previous[i] if group.previous else None
                    if self._cosines and previous is not None:
                        self._add(g, i, "gh", _dot(wide, previous.double()))

    @torch.no_grad()
    def read_before(self) -> None:
        """Copy the factors as they are before the step."""
        for group in self._groups:
            group.before = [group.stack(i) for i in range(group.num_factors)]

    @torch.no_grad()
    def read_after(self, extra: Sequence[Tensor] = ()) -> tuple[Reading, list[Array]]:
        """Read the factors after the step and bring everything to the host at once.

        Args:
            extra: Further tensors to bring along, such as the loss.

        Returns:
            The reading, and `extra` as float64 arrays.
        """
        with _plain_arithmetic(self.chains):
            for g, group in enumerate(self._groups):
                self._queue_after(g, group)
            first_extra = [self._copy.add(tensor) for tensor in extra]
            values = self._copy.fetch()
        fetched = {key: values[number] for key, number in self._numbers.items()}
        reading = self._assemble(fetched)
        for g, group in enumerate(self._groups):
            if self._cosines:
                group.previous, group.had_gradient = group.gradients, group.has_gradient
                group.previous_squares = [fetched.get((g, i, "gg")) for i in range(group.num_factors)]
            group.gradients, group.before = [], []
        return reading, [values[number] for number in first_extra]

    @torch.no_grad()
    def bring_home(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Bring tensors of a step that is not recorded to the host at once, as float64 arrays."""
        copy = HostCopy()
        for tensor in tensors:
            copy.add(tensor)
        return copy.fetch()

    def _add(self, g: int, i: int, name: str, tensor: Tensor) -> None:
        self._numbers[g, i, name] = self._copy.add(tensor)

    def _queue_after(self, g: int, group: Group) -> None:
        last = group.num_factors - 1
        for i in range(group.num_factors):
            before = group.before[i].double()
            after = group.stack(i).double()
            change = after - before
            self._add(g, i, "dd", _dot(change, change))
            self._add(g, i, "ww", _dot(after, after))
            self._add(g, i, "vv", _dot(before, before))
            gradient = group.gradients[i] if group.gradients else None
            if self._cosines and gradient is not None:
                self._add(g, i, "gd", _dot(gradient.double(), change))
            if not group.has_delta:
                continue
            pairs = {"step": (before, after)}
            if group.initial is not None and group.initial_scales is not None:
                initial, scaled = group.initial[i].double(), after
                if i == last:  # each with the scale of its time, which may have been changed in between
                    initial = initial * torch.as_tensor(group.initial_scales, device=initial.device)
                    scaled = after * torch.as_tensor(group.scales(), device=after.device)
                pairs["start"] = (initial, scaled)
            for name, (old, new) in pairs.items():
                if i in (0, last):
                    # [A | dA] and [dB; B']ᵀ: the order of the blocks follows measures.chains.update_core
                    blocks = (old, new - old) if i == 0 else (new - old, new)
                    self._add(g, i, name, triangular_factor(group.outer_rows(blocks, i)))
                else:
                    self._add(g, i, f"{name} before", group.chain_view(old, i))
                    self._add(g, i, f"{name} after", group.chain_view(new, i))

    def _assemble(self, fetched: dict[tuple[int, int, str], Array]) -> Reading:
        k = len(self.chains)
        rows: dict[str, list[Array]] = {
            name: [np.full(len(chain.factors), _NAN) for chain in self.chains]
            for name in ("grad_norm", "grad_cosine_previous", "update_norm", "weight_norm", "update_ratio")
        }
        descent, delta_norm, delta_update_norm = (np.full(k, _NAN) for _ in range(3))
        spectra: list[Array | None] = [None] * k
        update_spectra: list[Array | None] = [None] * k
        for g, group in enumerate(self._groups):
            size = len(group.members)
            total_gd, total_gg, total_dd = np.zeros(size), np.zeros(size), np.zeros(size)
            for i in range(group.num_factors):
                get = _getter(fetched, g, i, size)
                present = group.has_gradient[i] if group.has_gradient else np.zeros(size, dtype=bool)
                had = group.had_gradient[i] if group.had_gradient else np.zeros(size, dtype=bool)
                gg, dd = np.where(present, get("gg"), _NAN), get("dd")
                squares = group.previous_squares[i] if group.previous_squares else None
                hh = np.full(size, _NAN) if squares is None else squares
                columns = {
                    "grad_norm": np.sqrt(gg),
                    "grad_cosine_previous": np.where(had, _cosine(get("gh"), gg, hh), _NAN),
                    "update_norm": np.sqrt(dd),
                    "weight_norm": np.sqrt(get("ww")),
                    "update_ratio": _ratio(np.sqrt(dd), np.sqrt(get("vv"))),
                }
                for name, values in columns.items():
                    for member, value in zip(group.members, values, strict=True):
                        rows[name][member][i] = value
                # A factor without a gradient adds nothing to ⟨g, dF⟩ or ‖g‖², but its update counts.
                total_gd += np.where(present, get("gd"), 0.0)
                total_gg += np.where(present, gg, 0.0)
                total_dd += dd
            descent[group.members] = -_cosine(total_gd, total_gg, total_dd) if self._cosines else _NAN
            if not group.has_delta:
                continue
            update = group.scales() * _telescoped_core(fetched, g, group.num_factors, "step")
            if group.initial is None:
                delta = group.scales() * _present_core(fetched, g, group.num_factors)
            else:
                delta = _telescoped_core(fetched, g, group.num_factors, "start")
            delta_norm[group.members] = frobenius_norm(delta.reshape(len(delta), -1))
            delta_update_norm[group.members] = frobenius_norm(update.reshape(len(update), -1))
            if self._spectra:
                lengths = group.spectrum_lengths()
                for store, core, length in ((spectra, delta, lengths[0]), (update_spectra, update, lengths[1])):
                    for member, sigma in zip(group.members, spectrum(core)[:, :length], strict=True):
                        store[member] = sigma
        return Reading(
            **rows,
            descent_cosine=descent,
            delta_spectrum=spectra,
            delta_update_spectrum=update_spectra,
            delta_norm=delta_norm,
            delta_update_norm=delta_update_norm,
        )


def _telescoped_core(fetched: dict[tuple[int, int, str], Array], g: int, num_factors: int, name: str) -> Array:
    inner = range(1, num_factors - 1)
    return update_core(
        fetched[g, 0, name],
        [fetched[g, i, f"{name} before"] for i in inner],
        [fetched[g, i, f"{name} after"] for i in inner],
        fetched[g, num_factors - 1, name],
    )


def _present_core(fetched: dict[tuple[int, int, str], Array], g: int, num_factors: int) -> Array:
    """Core of A' W1' … B' from the triangular factors of [A | dA] and [dB; B']ᵀ: A' = A + dA in the same basis."""
    left, right = fetched[g, 0, "step"], fetched[g, num_factors - 1, "step"]
    inner = [fetched[g, i, "step after"] for i in range(1, num_factors - 1)]
    width = left.shape[-1] // 2
    return chain_core(left[..., :width] + left[..., width:], inner, right[..., right.shape[-1] // 2 :])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each pair of a stack, (k,)."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).reshape(-1)


def _cosine(dot: Array, square_a: Array, square_b: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(square_a) * np.sqrt(square_b)
        return np.asarray(np.divide(dot, norms, out=np.full(norms.shape, _NAN), where=norms > 0))


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.divide(top, bottom, out=np.full(top.shape, _NAN), where=bottom > 0))


def _getter(fetched: dict[tuple[int, int, str], Array], g: int, i: int, size: int) -> Callable[[str], Array]:
    return lambda name: fetched.get((g, i, name), np.full(size, _NAN))


def _plain_arithmetic(chains: Sequence[Chain]) -> torch.autocast:
    """Autocast off on the chains' device: the caller may be inside a bf16 or fp16 region."""
    device = chains[0].factors[0].parameter.device.type if chains else "cpu"
    return torch.autocast(device, enabled=False)
