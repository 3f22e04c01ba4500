"""Stack chains whose factors agree in shape, dtype and device, so that one call reads them all.

Legend: k members; (p, q) a factor as it is stored; (k, p, q) a stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.host import readable

Presence = NDArray[np.bool_]


@dataclass
class Group:
    """Chains of one shape and what is remembered of them from call to call.

    Attributes:
        members: Positions of the chains in the list they were taken from.
        chains: The chains themselves.
        has_delta: Whether delta is the product of their factors.
        gradients: Per factor (k, p, q), of this step; None where no member has one.
        has_gradient: Per factor (k,), which members have one.
        previous: Gradients of the last recorded step, None before it.
        previous_squares: Per factor (k,), their ‖g‖²; None where no member had one.
        had_gradient: Which members had one then.
        before: Per factor (k, p, q), as it was before the step.
        initial: Per factor (k, p, q), as it was when training began; None where the product was zero then.
        initial_scales: (k, 1, 1), the scales at that time.
    """

    members: list[int]
    chains: list[Chain]
    has_delta: bool
    gradients: list[Tensor | None] = field(default_factory=list)
    has_gradient: list[Presence] = field(default_factory=list)
    previous: list[Tensor | None] = field(default_factory=list)
    previous_squares: list[NDArray[np.float64] | None] = field(default_factory=list)
    had_gradient: list[Presence] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    initial: list[Tensor] | None = None
    initial_scales: NDArray[np.float64] | None = None

    @property
    def num_factors(self) -> int:
        """Number of factors of each member."""
        return len(self.chains[0].factors)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the factors in chain view."""
        return [factor.shape for factor in self.chains[0].factors]

    def scales(self) -> NDArray[np.float64]:
        """Return the present scale of each member, (k, 1, 1)."""
        return np.array([chain.scale for chain in self.chains], dtype=np.float64)[:, None, None]

    def stack(self, i: int) -> Tensor:
        """Copy factor `i` of every member, (k, p, q)."""
        factors = [chain.factors[i] for chain in self.chains]
        return readable(torch.stack([factor.matrix(factor.parameter.detach()) for factor in factors]))

    def stack_gradients(self, i: int, divisor: Tensor | float | None) -> tuple[Tensor | None, Presence]:
        """Copy the gradients of factor `i` divided by `divisor`, zeros for members without one."""
        factors = [chain.factors[i] for chain in self.chains]
        grads = [factor.parameter.grad for factor in factors]
        present = np.array([grad is not None for grad in grads])
        if not present.any():
            return None, present
        stack = readable(
            torch.stack(
                [
                    torch.zeros_like(factor.matrix(factor.parameter.detach()))
                    if grad is None
                    else factor.matrix(grad.detach().to_dense() if grad.is_sparse else grad.detach())
                    for factor, grad in zip(factors, grads, strict=True)
                ]
            )
        )
        if divisor is not None:
            stack = stack.double() / (divisor.to(stack.device) if isinstance(divisor, Tensor) else divisor)
        return stack, present

    def outer_rows(self, blocks: Sequence[Tensor], i: int) -> Tensor:
        """Put blocks of the outer factor `i` beside each other, as rows along its long side: (k, Σ w, d)."""
        # In chain view A (d_in, w) has its long side first, B (w, d_out) last.
        long_side_first = (i == 0) != self.chains[0].factors[i].transposed
        return torch.cat([block.mT if long_side_first else block for block in blocks], dim=1)

    def chain_view(self, stack: Tensor, i: int) -> Tensor:
        """Return a stack of factor `i` with the input side first."""
        return stack.mT if self.chains[0].factors[i].transposed else stack

    def spectrum_lengths(self) -> tuple[int, int]:
        """How many singular values delta and its update can have, by the narrowest width and the outer sizes."""
        outer = min(self.shapes[0][0], self.shapes[-1][1])
        width = min(shape[1] for shape in self.shapes[:-1])
        update = min(2 * width, outer)
        return (min(width, outer) if self.initial is None else update), update


def group_chains(chains: Sequence[Chain]) -> list[Group]:
    """Group chains by the shapes, orientation, dtype and device of their factors."""
    members: dict[object, list[int]] = defaultdict(list)
    for index, chain in enumerate(chains):
        signature = tuple((f.stored_shape, f.transposed, f.parameter.dtype, f.parameter.device) for f in chain.factors)
        members[signature, chain.refused is None].append(index)
    return [
        Group(indices, [chains[i] for i in indices], has_delta=chains[indices[0]].refused is None)
        for indices in members.values()
    ]
