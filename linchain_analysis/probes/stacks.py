"""Factors of one shape, of however many chains, stacked so that one call reads them all.

Legend: k factors of one stored shape (p, q); w the short side of an outer factor. Parts of an outer factor are, in this
order, F before the step, its change, and its gradient where it takes part; where delta is measured from factors whose
product was not zero, apart from these, F at the start and its change since then.

What is kept from step to step is two copies of the factors: the last gradients, and the factors before the step (with a
third, the factors when training began, only where a product was not zero then). Arithmetic is in float64, in pieces
that stay in a processor's cache and in memory that is used over and over: on CPUs page faults cost more than the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Piece:
    """Some of the factors, and the memory in which their parts are widened."""

    part: slice
    narrow: Tensor  # (j, p, q), in the stack's dtype
    old: Tensor  # (j, p, q) float64, as the next three
    new: Tensor
    change: Tensor
    gradient: Tensor


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
        place: As given.
        device: Where it is read: the factors' own, or the host where that has no float64.
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
        self._parameters: list[Tensor] = [factor.parameter for factor in factors]
        first = factors[0]
        self._shape = first.stored_shape
        self._transposed = first.transposed
        self._plain = all(tuple(factor.parameter.shape) == factor.stored_shape for factor in factors)
        device = first.parameter.device
        self.device = torch.device("cpu") if device.type == "mps" else device
        self._dtype = torch.float64 if first.parameter.dtype == torch.float64 else torch.float32
        self._direct = all(p.dtype == self._dtype and p.device == self.device for p in self._parameters)
        self._gradients: Tensor | None = None  # of the last recorded step; from `read_before` on, of this one
        self._spare: Tensor | None = None  # this step's gradients until then, and from then on factors before the step
        self._last_presence = self.has_gradient
        self._previous_squares: Array | None = None
        self._results: dict[str, Tensor] = {}
        self._lent: dict[str, Tensor] = {}
        self._scratch = scratch
        self._pieces_made: list[_Piece] = []
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

    @property
    def width(self) -> int:
        """w, the number of columns of an outer factor."""
        return self._shape[0] if self._long_last else self._shape[1]

    def initial(self, j: int) -> NDArray[np.floating]:
        """Return factor `j` as it was when training began, in chain view."""
        assert self._initial is not None
        return self._chain_view(self._initial[j])

    def set_initial(self, j: int, value: NDArray[np.floating]) -> None:
        """Take `value`, in chain view, as factor `j` when training began."""
        assert self._initial is not None
        stored = value.T if self._transposed else value
        self._initial[j].copy_(torch.from_numpy(np.ascontiguousarray(stored)))

    def whole_gradient(self, j: int) -> NDArray[np.floating] | None:
        """Return the gradient of factor `j` of this step in chain view; None without one."""
        return self._chain_view(self._gradients[j]) if self._gradients is not None and self.has_gradient[j] else None

    # --- every recorded step -----------------------------------------------------------------------------------

    def read_gradients(self, copy: HostCopy, divisor: Tensor | float | None, *, keep: bool) -> None:
        """Queue ‖g‖² and, where gradients are kept, ⟨g, g of the last recorded step⟩; keep g.

        Factors without a gradient count as zero here; `has_gradient` tells them. May be called again for the same step:
        what is kept of the last one stays until `read_before`.
        """
        grads = [parameter.grad for parameter in self._parameters]
        self.has_gradient = np.array([grad is not None for grad in grads])
        squares = self._result(copy, "gg", ())
        products = self._result(copy, "gh", ()) if keep and self._gradients is not None else None
        if not self.has_gradient.any():
            squares.zero_()
            if products is not None:
                products.zero_()
            if keep:
                self._fresh().zero_()
            return
        tensors = [self._gradient(j, grad) for j, grad in enumerate(grads)]
        for piece in self._pieces():
            # While nobody needs them later, gradients stay in the cache.
            fresh = self._fresh()[piece.part] if keep else piece.narrow
            self._gather(tensors[piece.part], fresh)
            if divisor is not None:
                # Not by the reciprocal, which would round twice.
                fresh /= divisor.to(fresh.device) if isinstance(divisor, Tensor) else divisor
            gradient = piece.gradient.copy_(fresh)
            torch.linalg.vector_norm(gradient, dim=(1, 2), out=squares[piece.part])
            if products is not None:
                assert self._gradients is not None
                last = piece.old.copy_(self._gradients[piece.part])
                _dot(gradient, last, piece.new, products[piece.part])
        squares.square_()

    def gradient_square(self, optimized: NDArray[np.bool_]) -> Tensor:
        """Return the sum of ‖g‖² just read over the factors that `optimized` marks, by their rows, on the device."""
        squares = self._results["gg"]
        kept = optimized[self.rows]
        return squares.sum() if kept.all() else squares[torch.from_numpy(kept).to(squares.device)].sum()

    def read_before(self, *, keep: bool) -> None:
        """Copy the factors as they are before the step; with `keep`, gradients just read become those of this step."""
        self.had_gradient, self._last_presence = self._last_presence, self.has_gradient
        if keep:
            # The copy of the factors takes the place of the last gradients: two copies are enough.
            self._gradients, self._spare = self._spare, self._gradients
        self._gather(self._values(), self._fresh())

    def read_after(self, copy: HostCopy, *, gradients: bool) -> None:
        """Queue norms and products of factors and updates, and what small coordinates are made of.

        Args:
            copy: Takes them to the host.
            gradients: Whether gradients take part in the small coordinates.
        """
        assert self._spare is not None
        if self.place == "inner":
            self._lend_inner(copy, self._spare)
            return
        values = self._values()
        # Squares of factors before the step and of their updates are traces of the blocks, where there are some.
        names = ("ww", "dd", "vv") if self.place == "elsewhere" else ("ww",)
        norms = {name: self._result(copy, name, ()) for name in names}
        along = self._result(copy, "gd", ()) if self._gradients is not None else None
        blocks = self._reserve_blocks(copy, "b", 2 + gradients)
        start_known = "s0_0" in self._results
        start_blocks = {} if self._initial is None else self._reserve_blocks(copy, "s", 2)
        for piece in self._pieces():
            part = piece.part
            self._gather(values[part], piece.narrow)
            new, old = piece.new.copy_(piece.narrow), piece.old.copy_(self._spare[part])
            change = torch.sub(new, old, out=piece.change)
            for name, operand in (("ww", new), ("dd", change), ("vv", old)):
                if name in norms:
                    torch.linalg.vector_norm(operand, dim=(1, 2), out=norms[name][part])
            parts = [old, change]
            if along is not None and self._gradients is not None:
                gradient = piece.gradient.copy_(self._gradients[part])
                _dot(gradient, change, new, along[part])  # the new values are not needed any more
                parts += [gradient] * gradients
            for name, block in blocks.items():
                _multiply(self._rows(parts[int(name[1])]), self._columns(parts[int(name[3])]), block[part])
            if self._initial is not None and start_blocks:
                start = piece.new.copy_(self._initial[part])
                moved = old.sub_(start).add_(change)
                for name, block in start_blocks.items():
                    if name != "s0_0" or not start_known:  # the start stays what it was
                        pair = [start if number == "0" else moved for number in (name[1], name[3])]
                        _multiply(self._rows(pair[0]), self._columns(pair[1]), block[part])
        for norm in norms.values():
            norm.square_()

    # --- on the host -------------------------------------------------------------------------------------------

    def finish(self, copy: HostCopy) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return, after the transfer, the numbers of each factor (k,) and what its small coordinates are made of.

        Returns:
            `gg hh gh gd dd ww vv`, where hh is ‖g‖² of the last recorded step and those not read are missing; and for
            inner factors `before change gradient start since_start` (k, w_{i-1}, w_i) in chain view, for outer ones
            `gram` (k, c, c) of the columns of their parts beside each other and `start_gram` of start and change.
        """
        found = {name: copy.fetched(place) for name, place in {**self._results, **self._lent}.items()}
        self._lent = {}
        small: dict[str, Array] = {}
        blocks = {name: found.pop(name) for name in list(found) if name[0] == "b" and name != "before"}
        start_blocks = {name: found.pop(name) for name in list(found) if name[0] == "s"}
        if self.place == "inner":
            found, small = self._finish_inner(found)
        elif blocks:
            found.setdefault("vv", np.einsum("kii->k", blocks["b0_0"]))
            found.setdefault("dd", np.einsum("kii->k", blocks["b1_1"]))
            small["gram"] = _assemble(blocks)
            if start_blocks:
                small["start_gram"] = _assemble(start_blocks)
        if self._previous_squares is not None:
            found["hh"] = self._previous_squares
        self._previous_squares = found["gg"].copy()
        return found, small

    # --- inside ------------------------------------------------------------------------------------------------

    def _lend_inner(self, copy: HostCopy, before: Tensor) -> None:
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
        small = {"before": whole["before"], "change": whole["after"] - whole["before"]}
        if "gradient" in whole:
            small["gradient"] = whole["gradient"]
            found["gd"] = np.einsum("kpq,kpq->k", whole["gradient"], small["change"])
        if "initial" in whole:
            small["start"], small["since_start"] = whole["initial"], whole["after"] - whole["initial"]
        for name, part in (("dd", small["change"]), ("ww", whole["after"]), ("vv", whole["before"])):
            found[name] = np.einsum("kpq,kpq->k", part, part)
        if self._transposed:
            small = {name: np.swapaxes(part, 1, 2) for name, part in small.items()}
        return found, small

    def _reserve_blocks(self, copy: HostCopy, letter: str, count: int) -> dict[str, Tensor]:
        """Places for the products of `count` parts of an outer factor with each other, named by both."""
        if self.place == "elsewhere":
            return {}
        names = [f"{letter}{a}_{b}" for a in range(count) for b in range(a, count)]
        return {name: self._result(copy, name, (self.width, self.width)) for name in names}

    @property
    def _long_last(self) -> bool:
        """Whether the long side of an outer factor is the second one of the stored matrix."""
        # In chain view A (d_in, w) has its long side first, B (w, d_out) last.
        return (self.place == "first") == self._transposed

    def _rows(self, part: Tensor) -> Tensor:
        return part if self._long_last else part.mT

    def _columns(self, part: Tensor) -> Tensor:
        return part.mT if self._long_last else part

    def _chain_view(self, stored: Tensor) -> NDArray[np.floating]:
        view: NDArray[np.floating] = (stored.T if self._transposed else stored).contiguous().cpu().numpy()
        return view

    def _values(self) -> list[Tensor]:
        if self._plain:
            return self._parameters
        return [factor.matrix(factor.parameter.detach()) for factor in self._factors]

    def _gradient(self, j: int, grad: Tensor | None) -> Tensor:
        if grad is None:
            grad = torch.zeros_like(self._parameters[j])
        elif grad.is_sparse:
            grad = grad.to_dense()
        return grad if self._plain else self._factors[j].matrix(grad)

    def _gather(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Stack `tensors` into `out`, whatever its dtype and device."""
        if self._direct and tensors[0].dtype == out.dtype:
            torch.stack(tensors, out=out)  # type: ignore[arg-type]
        else:
            out.copy_(torch.stack(tensors))  # type: ignore[arg-type]

    def _result(self, copy: HostCopy, name: str, shape: tuple[int, ...]) -> Tensor:
        """A place for a result of every factor, (k, *shape)."""
        if name not in self._results:
            self._results[name] = copy.reserve((len(self), *shape), self.device)
        return self._results[name]

    def _fresh(self) -> Tensor:
        """The copy that is free: of gradients until the factors are copied into it."""
        if self._spare is None:
            self._spare = self._buffer()
        return self._spare

    def _buffer(self) -> Tensor:
        return torch.empty((len(self), *self._shape), dtype=self._dtype, device=self.device)

    def _pieces(self) -> list[_Piece]:
        if not self._pieces_made:
            limit = _PIECE_BYTES if self.device.type == "cpu" else _PIECE_BYTES_ACCELERATOR
            size = max(1, limit // max(8 * self._shape[0] * self._shape[1], 1))
            for start in range(0, len(self), size):
                part = slice(start, min(start + size, len(self)))
                shape = (part.stop - part.start, *self._shape)
                wide = [
                    self._scratch.take(name, shape, torch.float64, self.device)
                    for name in ("old", "new", "change", "gradient")
                ]
                narrow = self._scratch.take("narrow", shape, self._dtype, self.device)
                self._pieces_made.append(_Piece(part, narrow, *wide))
        return self._pieces_made


def _assemble(blocks: Mapping[str, Array]) -> Array:
    """The Gram matrix (k, c, c) from its blocks on and above the diagonal, named `b0_0`, `b0_1`, …."""
    count = max(int(name[3]) for name in blocks) + 1
    k, w, _ = next(iter(blocks.values())).shape
    gram = np.empty((k, count * w, count * w))
    for name, block in blocks.items():
        a, b = int(name[1]) * w, int(name[3]) * w
        gram[:, a : a + w, b : b + w] = block
        if a != b:
            gram[:, b : b + w, a : a + w] = np.swapaxes(block, 1, 2)
    return gram


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b of each pair of a stack."""
    if a.device.type == "cpu":
        # The same numbers; for matrices this small and long NumPy's library takes a half to a quarter of the time.
        np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    else:
        torch.bmm(a, b, out=out)


def _dot(a: Tensor, b: Tensor, scratch: Tensor, out: Tensor) -> None:
    """⟨a, b⟩ of each pair of a stack, (k,); three times as fast on a CPU as a batched product of vectors."""
    torch.sum(torch.mul(a, b, out=scratch), dim=(1, 2), out=out)
