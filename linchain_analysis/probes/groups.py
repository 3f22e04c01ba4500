"""Which stacks the factors of a model's chains go to, and which chains are computed with together on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array
from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.host import Scratch, readable
from linchain_analysis.probes.stacks import FactorStack, Place

Integers = NDArray[np.int_]


@dataclass(frozen=True)
class Shelf:
    """Stacks whose factors have one shape in small coordinates: outer ones of any length, or inner ones.

    Attributes:
        stacks: The stacks, in the order in which their factors stand here.
        initial: Whether they remember the factors when training began.
    """

    stacks: tuple[FactorStack, ...]
    initial: bool

    @property
    def is_outer(self) -> bool:
        """Whether these are first or last factors."""
        return self.stacks[0].place != "inner"


class Group:
    """Chains of one shape in small coordinates.

    Args:
        members: Positions of the chains in the list they were taken from.
        chains: The chains themselves.
        places: Per factor, the number of its shelf and where the members' factors stand there.
        rows: (k, m), the rows of their factors in the table `factors`.
        has_initial: Whether delta is measured from factors whose product was not zero.

    Attributes:
        initial_scales: (k,), the scales when training began.
    """

    def __init__(
        self,
        members: Sequence[int],
        chains: Sequence[Chain],
        places: list[tuple[int, Integers]],
        rows: Integers,
        *,
        has_initial: bool,
    ) -> None:
        self.members = np.array(members)
        self.chains = list(chains)
        self.places = places
        self.rows = rows
        self.has_initial = has_initial
        self.initial_scales = self.scales()
        self.shapes = [factor.shape for factor in chains[0].factors]

    @property
    def num_factors(self) -> int:
        """Number of factors of each member."""
        return len(self.shapes)

    def scales(self) -> Array:
        """Return the present scale of each member, (k,)."""
        return np.array([chain.scale for chain in self.chains], dtype=np.float64)

    def spectrum_lengths(self) -> tuple[int, int]:
        """How many singular values delta and its update can have."""
        return _spectrum_lengths(self.chains[0], self.has_initial)

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


def stack_chains(
    chains: Sequence[Chain], starts: Sequence[bool], *, apart: bool
) -> tuple[list[FactorStack], list[Shelf], list[Group]]:
    """Put the factors of `chains` on stacks by shape, orientation, place, dtype and device.

    Args:
        chains: What to read.
        starts: Per chain, whether its product is not zero now, so that delta has to be measured from its factors.
        apart: Whether chains that differ in d_in or d_out are kept in groups of their own, as measures want them.

    Returns:
        The stacks, these on shelves, and the chains whose delta is a product of factors in groups.
    """
    scratch = Scratch()
    entries: dict[tuple[object, ...], list[tuple[int, int, int]]] = defaultdict(list)  # row, chain, factor
    rows: list[list[int]] = []
    row = 0
    for c, (chain, start) in enumerate(zip(chains, starts, strict=True)):
        rows.append(list(range(row, row + len(chain.factors))))
        for i, factor in enumerate(chain.factors):
            parameter = factor.parameter
            key = (factor.stored_shape, factor.transposed, _place(chain, i), parameter.dtype, parameter.device, start)
            entries[key].append((row, c, i))
            row += 1
    stacks = [
        FactorStack(
            [r for r, _, _ in found],
            [chains[c].factors[i] for _, c, i in found],
            _place(chains[found[0][1]], found[0][2]),
            scratch,
            initial=starts[found[0][1]],
        )
        for found in entries.values()
    ]
    shelves, shelf_of_row, place_of_row = _put_on_shelves(stacks, row)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for c, (chain, start) in enumerate(zip(chains, starts, strict=True)):
        if chain.refused is None:
            shelf_numbers = tuple(int(shelf_of_row[r]) for r in rows[c])
            size = (chain.factors[0].shape[0], chain.factors[-1].shape[1]) if apart else ()
            dtype = chain.factors[0].parameter.dtype
            groups[shelf_numbers, size, _spectrum_lengths(chain, start), dtype].append(c)
    made = []
    for members in groups.values():
        of_members = np.array([rows[c] for c in members])
        places = [(int(shelf_of_row[column[0]]), place_of_row[column]) for column in of_members.T]
        kept = [chains[c] for c in members]
        made.append(Group(members, kept, places, of_members, has_initial=starts[members[0]]))
    return stacks, shelves, made


def _put_on_shelves(stacks: Sequence[FactorStack], num_rows: int) -> tuple[list[Shelf], Integers, Integers]:
    """Return the shelves, and by row of `factors` the shelf (−1 for none) and the place on it."""
    alike: dict[object, list[FactorStack]] = defaultdict(list)
    for stack in stacks:
        if stack.place == "inner":
            alike[id(stack)].append(stack)
        elif stack.place != "elsewhere":
            alike[stack.width, stack.has_initial].append(stack)
    shelf_of_row, place_of_row = np.full(num_rows, -1), np.zeros(num_rows, dtype=int)
    shelves = []
    for number, together in enumerate(alike.values()):
        shelves.append(Shelf(tuple(together), together[0].has_initial))
        rows = np.concatenate([stack.rows for stack in together])
        shelf_of_row[rows], place_of_row[rows] = number, np.arange(len(rows))
    return shelves, shelf_of_row, place_of_row


def _spectrum_lengths(chain: Chain, has_initial: bool) -> tuple[int, int]:
    """How many singular values delta and its update can have, by the narrowest width and the outer sizes."""
    if len(chain.factors) < 2:
        return 0, 0
    shapes = [factor.shape for factor in chain.factors]
    outer = min(shapes[0][0], shapes[-1][1])
    width = min(shape[1] for shape in shapes[:-1])
    update = min(2 * width, outer)
    return (update if has_initial else min(width, outer)), update


def _place(chain: Chain, i: int) -> Place:
    if chain.refused is not None:
        return "elsewhere"
    return "first" if i == 0 else "last" if i == len(chain.factors) - 1 else "inner"


def _chain_view(chain: Chain, i: int) -> torch.Tensor:
    factor = chain.factors[i]
    return readable(factor.view(factor.parameter.detach())).double()
