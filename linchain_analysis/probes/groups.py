"""Which stacks the factors of a model's chains go to, and which chains have one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array
from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.host import Scratch
from linchain_analysis.probes.stacks import FactorStack, Place


class Group:
    """Chains of one shape.

    Args:
        members: Positions of the chains in the list they were taken from.
        chains: The chains themselves.
        stacks: Per factor, the stack that holds it and where the members' factors stand there.

    Attributes:
        initial_scales: (k,), the scales when training began.
    """

    def __init__(
        self, members: Sequence[int], chains: Sequence[Chain], stacks: list[tuple[FactorStack, NDArray[np.int_]]]
    ) -> None:
        self.members = np.array(members)
        self.chains = list(chains)
        self.stacks = stacks
        self.initial_scales = self.scales()
        self.shapes = [factor.shape for factor in chains[0].factors]

    @property
    def num_factors(self) -> int:
        """Number of factors of each member."""
        return len(self.shapes)

    @property
    def has_initial(self) -> bool:
        """Whether delta is measured from factors whose product was not zero."""
        return self.stacks[0][0].has_initial

    def scales(self) -> Array:
        """Return the present scale of each member, (k,)."""
        return np.array([chain.scale for chain in self.chains], dtype=np.float64)

    def spectrum_lengths(self) -> tuple[int, int]:
        """How many singular values delta and its update can have, by the narrowest width and the outer sizes."""
        outer = min(self.shapes[0][0], self.shapes[-1][1])
        width = min(shape[1] for shape in self.shapes[:-1])
        update = min(2 * width, outer)
        return (update if self.has_initial else min(width, outer)), update

    @torch.no_grad()
    def squares(self) -> tuple[tuple[Array, Array], ...]:
        """Return F_iᵀF_i and F_{i+1}F_{i+1}ᵀ of each pair of neighbouring factors as they are now, (k, w_i, w_i)."""
        found = []
        for i in range(self.num_factors - 1):
            left = [_chain_view(chain, i) for chain in self.chains]
            right = [_chain_view(chain, i + 1) for chain in self.chains]
            found.append(
                (
                    torch.stack([view.mT @ view for view in left]).cpu().numpy(),
                    torch.stack([view @ view.mT for view in right]).cpu().numpy(),
                )
            )
        return tuple(found)


def stack_chains(chains: Sequence[Chain], starts: Sequence[bool]) -> tuple[list[FactorStack], list[Group]]:
    """Put the factors of `chains` on stacks by shape, orientation, place, dtype and device.

    Args:
        chains: What to read.
        starts: Per chain, whether its product is not zero now, so that delta has to be measured from its factors.

    Returns:
        The stacks, and the chains whose delta is a product of factors in groups of one shape.
    """
    scratch = Scratch()
    on_stacks: dict[tuple[object, ...], list[tuple[int, int, int]]] = defaultdict(list)  # row, chain, factor
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    row = 0
    for c, (chain, start) in enumerate(zip(chains, starts, strict=True)):
        signature = []
        for i, factor in enumerate(chain.factors):
            parameter = factor.parameter
            place = _place(chain, i)
            key = (factor.stored_shape, factor.transposed, place, parameter.dtype, parameter.device, start)
            on_stacks[key].append((row, c, i))
            signature.append(key)
            row += 1
        if chain.refused is None:
            groups[tuple(signature)].append(c)
    stacks: list[FactorStack] = []
    homes: dict[tuple[int, int], tuple[FactorStack, int]] = {}
    for stack_key, entries in on_stacks.items():
        stack = FactorStack(
            [r for r, _, _ in entries],
            [chains[c].factors[i] for _, c, i in entries],
            _place(chains[entries[0][1]], entries[0][2]),
            scratch,
            initial=bool(stack_key[-1]) and chains[entries[0][1]].refused is None,
        )
        stacks.append(stack)
        homes.update({(c, i): (stack, position) for position, (_, c, i) in enumerate(entries)})
    return stacks, [
        Group(
            members,
            [chains[c] for c in members],
            [
                (homes[members[0], i][0], np.array([homes[c, i][1] for c in members]))
                for i in range(len(chains[members[0]].factors))
            ],
        )
        for members in groups.values()
    ]


def _place(chain: Chain, i: int) -> Place:
    if chain.refused is not None:
        return "elsewhere"
    return "first" if i == 0 else "last" if i == len(chain.factors) - 1 else "inner"


def _chain_view(chain: Chain, i: int) -> torch.Tensor:
    factor = chain.factors[i]
    stored = factor.matrix(factor.parameter.detach()).to("cpu" if factor.parameter.device.type == "mps" else None)
    return (stored.mT if factor.transposed else stored).double()
