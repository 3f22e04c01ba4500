"""Factors of one shape, of however many chains, stacked so that one call reads them all.

Legend: k factors of one stored shape (p, q); w the short side and d the long one of an outer factor.

What is kept from step to step is at most two copies of the factors: the last gradients, and the factors before the step
(with a third, the factors when training began, only where a product was not zero then). Arithmetic is in float64, in
pieces that stay in a processor's cache and in memory that is used over and over: on CPUs page faults cost more than
the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linchain_analysis.probes.chains import Factor
from linchain_analysis.probes.host import HostCopy, Scratch

Array = NDArray[np.float64]
Presence = NDArray[np.bool_]
Place = Literal["first", "inner", "last", "elsewhere"]

_PIECE_BYTES = 1 << 18  # of one float64 operand on a CPU, whose cache it shares with a few others
_PIECE_BYTES_ACCELERATOR = 1 << 28


class FactorStack:
    """Factors of one shape and what is remembered of them from step to step.

    Args:
        rows: Number of each factor's row in the table `factors`.
        factors: The factors themselves.
        place: Where they stand in their chains; `elsewhere` for those whose product is not delta.
        scratch: Memory for intermediate results, shared by all stacks.
        initial: Whether to remember the factors as they are now.

    Attributes:
        rows: As given.
        has_gradient: (k,), which factors had a gradient in this step.
        had_gradient: The same of the last recorded step.
    """

    def __init__(
        self, rows: Sequence[int], factors: Sequence[Factor], place: Place, scratch: Scratch, *, initial: bool
    ) -> None:
        self.rows = np.array(rows)
        self.place = place
        self.has_gradient = np.zeros(len(factors), dtype=bool)
        self.had_gradient = np.zeros(len(factors), dtype=bool)
        self._factors = list(factors)
        first = factors[0]
        self._shape = first.stored_shape
        self._transposed = first.transposed
        self._plain = all(factor.parameter.shape == factor.stored_shape for factor in factors)
        device = first.parameter.device
        self.device = torch.device("cpu") if device.type == "mps" else device
        self._dtype = torch.float64 if first.parameter.dtype == torch.float64 else torch.float32
        self._scratch = scratch
        self._gradients: Tensor | None = None  # of the last recorded step; from `read_before` on, of this one
        self._spare: Tensor | None = None  # this step's gradients until then, and from then on factors before the step
        self._num_kept = 0
        self._last_presence = self.has_gradient
        self._previous_squares: Array | None = None
        self._results: dict[str, Tensor] = {}
        self._lent: dict[str, Tensor] = {}
        self._initial: Tensor | None = None
        if initial:
            self._initial = self._buffer()
            self._gather(self._values(), self._initial)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def has_initial(self) -> bool:
        """Whether the factors when training began are remembered."""
        return self._initial is not None

    def initial(self, j: int) -> NDArray[np.floating]:
        """Return factor `j` as it was when training began, in chain view."""
        assert self._initial is not None
        stored = self._initial[j]
        return (stored.T if self._transposed else stored).contiguous().cpu().numpy()

    # --- every recorded step -----------------------------------------------------------------------------------

    def read_gradients(self, copy: HostCopy, divisor: Tensor | float | None, *, keep: bool) -> None:
        """Queue ‖g‖² and, where gradients are kept, ⟨g, g of the last recorded step⟩; keep g.

        Factors without a gradient count as zero here; `has_gradient` tells them. May be called again for the same step:
        what is kept of the last one stays until `read_before`.
        """
        grads = [factor.parameter.grad for factor in self._factors]
        self.has_gradient = np.array([grad is not None for grad in grads])
        compared = keep and self._num_kept > 0
        squares = self._result(copy, "gg", ())
        products = self._result(copy, "gh", ()) if compared else None
        if self._spare is None:
            self._spare = self._buffer()
        fresh = self._spare  # free until the factors are copied into it
        if not self.has_gradient.any():
            fresh.zero_()
        else:
            self._gather([self._gradient(j, grad) for j, grad in enumerate(grads)], fresh)
            if divisor is not None:
                # Not by the reciprocal, which would round twice.
                fresh /= divisor.to(fresh.device) if isinstance(divisor, Tensor) else divisor
        for piece in self._pieces():
            wide = self._wide("gradient", fresh[piece])
            _square(wide, squares[piece])
            if products is not None:
                assert self._gradients is not None
                _dot(wide, self._wide("old", self._gradients[piece]), products[piece])

    def read_before(self, *, keep: bool) -> None:
        """Copy the factors as they are before the step; with `keep`, gradients just read become those of this step."""
        self.had_gradient, self._last_presence = self._last_presence, self.has_gradient
        if keep:
            # The copy of the factors takes the place of the last gradients: two copies are enough.
            self._gradients, self._spare = self._spare, self._gradients
            self._num_kept += 1
        if self._spare is None:
            self._spare = self._buffer()
        self._gather(self._values(), self._spare)

    def read_after(self, copy: HostCopy, *, gradients: bool, narrow: bool) -> None:
        """Queue norms and products of factors and updates, and what small coordinates are made of.

        Args:
            copy: Takes them to the host.
            gradients: Whether gradients take part in the small coordinates.
            narrow: Whether products of outer factors may be taken in float32, enough for norms.
        """
        assert self._spare is not None
        if self.place == "inner":
            self._read_inner(copy, self._spare)
            return
        values = self._values()
        # The squares of factors before the step and of their updates are traces of the blocks, where there are some.
        traced = self.place != "elsewhere" and self._initial is None and not narrow
        squares = {name: self._result(copy, name, ()) for name in (("ww",) if traced else ("dd", "ww", "vv"))}
        along = self._result(copy, "gd", ()) if self._gradients is not None else None
        blocks = self._reserve_blocks(copy, gradients)
        for piece in self._pieces():
            fresh = self._take("narrow", self._spare[piece].shape, self._dtype)
            self._gather(values[piece], fresh)
            old, new = self._wide("old", self._spare[piece]), self._wide("new", fresh)
            change = torch.sub(new, old, out=self._take("change", old.shape))
            for name, part in (("dd", change), ("ww", new), ("vv", old)):
                if name in squares:
                    _square(part, squares[name][piece])
            parts = [old, change]
            if along is not None and self._gradients is not None:
                gradient = self._wide("gradient", self._gradients[piece])
                _dot(gradient, change, along[piece])
                parts += [gradient] * gradients
            if self._initial is not None:
                parts.append(old - self._wide("new", self._initial[piece]))
            if self.place == "elsewhere":
                continue
            if self._initial is not None:
                self._reduce_by_qr(parts, blocks["r"][piece])
            elif narrow:
                self._multiply_narrow(parts, squares, blocks, piece)
            else:
                for (a, b), block in self._pairs(blocks):
                    torch.bmm(self._short_first(parts[a]), self._short_last(parts[b]), out=block[piece])

    def gradient_square(self, optimized: NDArray[np.bool_]) -> Tensor:
        """Return the sum of ‖g‖² just read over the factors that `optimized` marks, by their rows, on the device."""
        squares = self._results["gg"]
        kept = optimized[self.rows]
        return squares.sum() if kept.all() else squares[torch.from_numpy(kept).to(squares.device)].sum()

    # --- on the host -------------------------------------------------------------------------------------------

    def finish(self, copy: HostCopy) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return, after the transfer, the numbers of each factor (k,) and what its small coordinates are made of.

        Returns:
            `gg hh gh gd dd ww vv`, where hh is ‖g‖² of the last recorded step and those not read are missing; and for
            inner factors `before change gradient` (k, w_{i-1}, w_i) in chain view, for outer ones `gram` (k, c, c) of
            [F | dF | g] or `r` of their QR decomposition with F minus F at the start.
        """
        found = {name: copy.fetched(place) for name, place in {**self._results, **self._lent}.items()}
        self._lent = {}
        small: dict[str, Array] = {}
        if self.place == "inner":
            found, small = self._finish_inner(found)
        elif "r" in found:
            small["r"] = found.pop("r")
        else:
            blocks = {name: found.pop(name) for name in list(found) if len(name) == 4}
            if blocks:
                found.setdefault("vv", np.einsum("kii->k", blocks["b0_0"]))
                found.setdefault("dd", np.einsum("kii->k", blocks["b1_1"]))
                small["gram"] = _assemble(blocks)
        if self._previous_squares is not None:
            found["hh"] = self._previous_squares
        self._previous_squares = found["gg"]
        return found, small

    def whole_gradient(self, j: int) -> NDArray[np.floating] | None:
        """Return the gradient of factor `j` of this step in chain view; None without one."""
        if self._gradients is None or not self._last_presence[j]:
            return None
        stored = self._gradients[j]
        return (stored.T if self._transposed else stored).contiguous().cpu().numpy()

    # --- inside ------------------------------------------------------------------------------------------------

    def _read_inner(self, copy: HostCopy, before: Tensor) -> None:
        """Inner factors are small: they go to the host whole."""
        after = self._buffer()
        self._gather(self._values(), after)
        self._lent = {"before": copy.lend(before), "after": copy.lend(after)}
        if self._gradients is not None:
            self._lent["gradient"] = copy.lend(self._gradients)
        if self._initial is not None:
            self._lent["initial"] = copy.lend(self._initial)

    def _finish_inner(self, found: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        whole = {name: found.pop(name) for name in ("before", "after", "gradient", "initial") if name in found}
        change = whole["after"] - whole["before"]
        with np.errstate(over="ignore", invalid="ignore"):
            found |= {
                "dd": np.einsum("kpq,kpq->k", change, change),
                "ww": np.einsum("kpq,kpq->k", whole["after"], whole["after"]),
                "vv": np.einsum("kpq,kpq->k", whole["before"], whole["before"]),
            }
            if "gradient" in whole:
                found["gd"] = np.einsum("kpq,kpq->k", whole["gradient"], change)
        small = {"before": whole["before"], "change": change}
        if "gradient" in whole:
            small["gradient"] = whole["gradient"]
        if "initial" in whole:
            small["since_start"] = whole["before"] - whole["initial"]
        if self._transposed:
            small = {name: np.swapaxes(part, 1, 2) for name, part in small.items()}
        return found, small

    def _reserve_blocks(self, copy: HostCopy, gradients: bool) -> dict[str, Tensor]:
        """Places for the products of the parts of an outer factor: 0 before, 1 change, 2 gradient."""
        if self.place == "elsewhere":
            return {}
        width = self.width
        if self._initial is not None:
            columns = width * (3 + gradients)
            return {"r": self._result(copy, "r", (columns, columns))}
        count = 2 + gradients
        names = [f"b{a}_{b}" for a in range(count) for b in range(a, count)]
        return {name: self._result(copy, name, (width, width)) for name in names}

    @staticmethod
    def _pairs(blocks: Mapping[str, Tensor]) -> list[tuple[tuple[int, int], Tensor]]:
        return [((int(name[1]), int(name[3])), block) for name, block in blocks.items()]

    def _multiply_narrow(
        self, parts: Sequence[Tensor], squares: Mapping[str, Tensor], blocks: Mapping[str, Tensor], piece: slice
    ) -> None:
        """Products in float32 of parts brought to length 1, whose squares neither overflow nor vanish."""
        norms = [squares[name][piece].sqrt().view(-1, 1, 1) for name in ("vv", "dd")]
        norms = [torch.where(norm > 0, norm, 1.0) for norm in norms]
        units = [(part / norm).float() for part, norm in zip(parts, norms, strict=True)]
        for (a, b), block in self._pairs(blocks):
            block[piece] = torch.bmm(self._short_first(units[a]), self._short_last(units[b])) * (norms[a] * norms[b])

    def _reduce_by_qr(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """R of the columns of an outer factor and what belongs to it, beside each other.

        Where delta is a difference of two products that are not zero, what stands beside the factor may depend on it so
        closely that a Gram matrix would lose half of the digits.
        """
        tall = torch.cat([self._short_last(part) for part in parts], dim=2)
        finite = tall.isfinite().flatten(1).all(dim=1)[:, None, None]  # LAPACK's answer to NaN is undefined
        r = torch.linalg.qr(torch.where(finite, tall, 0.0), mode="r").R
        out.zero_()
        out[:, : r.shape[1]] = torch.where(finite, r, torch.nan)

    @property
    def width(self) -> int:
        """w, the number of columns of an outer factor."""
        return self._shape[0] if self._long_last else self._shape[1]

    @property
    def _long_last(self) -> bool:
        """Whether the long side of an outer factor is the second one of the stored matrix."""
        # In chain view A (d_in, w) has its long side first, B (w, d_out) last.
        return (self.place == "first") == self._transposed

    def _short_first(self, part: Tensor) -> Tensor:
        return part if self._long_last else part.mT

    def _short_last(self, part: Tensor) -> Tensor:
        return part.mT if self._long_last else part

    def _values(self) -> list[Tensor]:
        if self._plain:
            return [factor.parameter.detach() for factor in self._factors]
        return [factor.matrix(factor.parameter.detach()) for factor in self._factors]

    def _gradient(self, j: int, grad: Tensor | None) -> Tensor:
        factor = self._factors[j]
        if grad is None:
            return torch.zeros_like(factor.matrix(factor.parameter.detach()))
        if grad.is_sparse:
            grad = grad.to_dense()
        return grad if self._plain else factor.matrix(grad)

    def _gather(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Stack `tensors` into `out`, whatever its dtype and device."""
        first = tensors[0]
        if first.dtype == out.dtype and first.device == out.device:
            torch.stack(list(tensors), out=out)
        else:
            out.copy_(torch.stack(list(tensors)))

    def _result(self, copy: HostCopy, name: str, shape: tuple[int, ...]) -> Tensor:
        """A place for a result of every factor, (k, *shape)."""
        if name not in self._results:
            self._results[name] = copy.reserve((len(self), *shape), self.device)
        return self._results[name]

    def _buffer(self) -> Tensor:
        return torch.empty((len(self), *self._shape), dtype=self._dtype, device=self.device)

    def _take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return self._scratch.take(name, tuple(shape), dtype, self.device)

    def _wide(self, name: str, source: Tensor) -> Tensor:
        """Return `source` in float64, in a place that the next call of this name writes over."""
        return self._take(name, source.shape).copy_(source)

    def _pieces(self) -> list[slice]:
        limit = _PIECE_BYTES if self.device.type == "cpu" else _PIECE_BYTES_ACCELERATOR
        size = max(1, limit // max(8 * self._shape[0] * self._shape[1], 1))
        return [slice(start, start + size) for start in range(0, len(self), size)]


def _assemble(blocks: Mapping[str, Array]) -> Array:
    """The Gram matrix (k, c, c) from its blocks on and above the diagonal."""
    count = max(int(name[3]) for name in blocks) + 1
    upper = {(int(name[1]), int(name[3])): block for name, block in blocks.items()}
    return np.concatenate(
        [
            np.concatenate([upper[a, b] if a <= b else np.swapaxes(upper[b, a], 1, 2) for b in range(count)], axis=2)
            for a in range(count)
        ],
        axis=1,
    )


def _square(a: Tensor, out: Tensor) -> None:
    """‖a‖² of each of a stack, (k,)."""
    torch.linalg.vector_norm(a, dim=(1, 2), out=out)
    out.square_()


def _dot(a: Tensor, b: Tensor, out: Tensor) -> None:
    """⟨a, b⟩ of each pair of a stack, (k,)."""
    torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1), out=out.view(-1, 1, 1))
