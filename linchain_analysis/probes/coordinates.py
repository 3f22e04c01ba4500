"""From what stacks brought to the host to the chains of a group in small coordinates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.grams import coordinates_from_gram
from linchain_analysis.measures.spectral import Array
from linchain_analysis.probes.groups import Group
from linchain_analysis.probes.stacks import FactorStack


def split_columns(
    stacks: Sequence[FactorStack], small: Mapping[int, Mapping[str, Array]], *, gradients: bool
) -> dict[int, dict[str, Array]]:
    """Return, by the identity of a stack, each part of its factors in small coordinates.

    Inner factors are in chain view, outer ones have their long side, made short, first.

    Args:
        stacks: The stacks of whole chains.
        small: By the identity of a stack, what small coordinates of its factors are made of (`FactorStack.finish`).
        gradients: Whether the gradients take part.
    """
    parts = {id(stack): dict(small[id(stack)]) for stack in stacks if stack.place == "inner"}
    outer = [stack for stack in stacks if stack.place in ("first", "last")]
    columns = {id(stack): small[id(stack)]["r"] for stack in outer if "r" in small[id(stack)]}
    by_width: dict[int, list[FactorStack]] = defaultdict(list)
    for stack in outer:
        if "gram" in small[id(stack)]:
            by_width[small[id(stack)]["gram"].shape[-1]].append(stack)
    for alike in by_width.values():  # one decomposition for all
        found = coordinates_from_gram(np.concatenate([small[id(stack)]["gram"] for stack in alike]))
        ends = np.cumsum([len(stack) for stack in alike])
        columns |= {id(stack): part for stack, part in zip(alike, np.split(found, ends[:-1]), strict=True)}
    parts |= {id(stack): {} for stack in outer}
    for stack, end in _ends([stack for stack in outer if "gram" in small[id(stack)]], small):
        parts[id(stack)]["end"] = end
    for stack in outer:
        names = ["before", "change", *["gradient"] * gradients, *["since_start"] * stack.has_initial]
        pieces = np.split(columns[id(stack)], len(names), axis=2)
        parts[id(stack)] |= dict(zip(names, pieces, strict=True))
    return parts


def _ends(
    stacks: Sequence[FactorStack], small: Mapping[int, Mapping[str, Array]]
) -> Iterator[tuple[FactorStack, Array]]:
    """Yield R of each outer factor after the step alone, (k, w, w): it spans less than it does with its update."""
    by_width: dict[int, list[tuple[FactorStack, Array]]] = defaultdict(list)
    for stack in stacks:
        width = stack.width
        gram = small[id(stack)]["gram"][:, : 2 * width, : 2 * width]
        after = gram[:, :width, :width] + gram[:, width:, width:] + gram[:, :width, width:] + gram[:, width:, :width]
        by_width[width].append((stack, after))
    for alike in by_width.values():
        found = coordinates_from_gram(np.concatenate([gram for _, gram in alike]))
        stops = np.cumsum([len(stack) for stack, _ in alike])
        yield from zip([stack for stack, _ in alike], np.split(found, stops[:-1]), strict=True)


def small_chains(group: Group, parts: Mapping[int, Mapping[str, Array]], *, gradients: bool, **known: Any) -> Cores:
    """Return the chains of `group` in small coordinates.

    Args:
        group: Whose chains they are.
        parts: What `split_columns` returned.
        gradients: Whether the gradients take part.
        known: Further fields of `Cores`.
    """
    names = ["before", "change", *["gradient"] * gradients, *["since_start"] * group.has_initial]
    factors: dict[str, list[Array]] = {name: [] for name in names}
    for i, (stack, positions) in enumerate(group.stacks):
        for name in names:
            part = parts[id(stack)][name][positions]
            if name == "gradient":
                part = np.where(stack.has_gradient[positions][:, None, None], part, np.nan)
            outer_last = i == group.num_factors - 1
            factors[name].append(np.swapaxes(part, 1, 2) if outer_last else part)
    columns: dict[str, Any] = {name: tuple(values) for name, values in factors.items()}
    outer = [(parts[id(stack)], positions) for stack, positions in (group.stacks[0], group.stacks[-1])]
    if all("end" in part for part, _ in outer):
        columns["ends"] = tuple(part["end"][positions] for part, positions in outer)
    parameter = group.chains[0].factors[0].parameter
    return Cores(
        scale=group.scales(),
        size=(group.shapes[0][0], group.shapes[-1][1]),
        start_scale=group.initial_scales if group.has_initial else None,
        epsilon=float(torch.finfo(parameter.dtype).eps),
        **columns,
        **known,
    )
