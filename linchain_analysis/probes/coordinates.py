"""From what stacks brought to the host to the chains of a group in small coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.grams import coordinates_from_gram
from linchain_analysis.measures.spectral import Array
from linchain_analysis.probes.groups import Group, Shelf


def split_columns(shelf: Shelf, small: Mapping[int, Mapping[str, Array]], *, gradients: bool) -> dict[str, Array]:
    """Return each part of the factors on a shelf in small coordinates; of outer ones without a start R alone, as `end`.

    Inner factors are in chain view, outer ones have their long side, made short, first.

    Args:
        shelf: The factors.
        small: By the identity of a stack, what small coordinates of its factors are made of (`FactorStack.finish`).
        gradients: Whether the gradients take part.
    """
    found = [small[id(stack)] for stack in shelf.stacks]
    if not shelf.is_outer:
        return dict(found[0])
    gram = _join([part["gram"] for part in found])
    parts = _split(gram, ["before", "change", *["gradient"] * gradients])
    if shelf.initial:
        return parts | _split(_join([part["start_gram"] for part in found]), ["start", "since_start"])
    return parts | {"end": _end(gram, shelf.stacks[0].width)}


def _join(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _split(gram: Array, names: Sequence[str]) -> dict[str, Array]:
    return dict(zip(names, np.split(coordinates_from_gram(gram), len(names), axis=2), strict=True))


def _end(gram: Array, width: int) -> Array:
    """R of each outer factor after the step alone, (k, w, w): it spans less than it does with its update."""
    old, new = slice(width), slice(width, 2 * width)
    return coordinates_from_gram(gram[:, old, old] + gram[:, new, new] + gram[:, old, new] + gram[:, new, old])


def small_chains(
    group: Group, parts: Sequence[Mapping[str, Array]], present: NDArray[np.bool_], *, gradients: bool, **known: Any
) -> Cores:
    """Return the chains of `group` in small coordinates.

    Args:
        group: Whose chains they are.
        parts: What `split_columns` returned of each shelf.
        present: By row of `factors`, which factors have a gradient.
        gradients: Whether the gradients take part.
        known: Further fields of `Cores`.
    """
    names = ["before", "change", *["gradient"] * gradients, *["start", "since_start"] * group.has_initial]
    columns: dict[str, Any] = dict.fromkeys(names, ())
    for i, (shelf, places) in enumerate(group.places):
        for name in names:
            part = parts[shelf][name][places]
            if name == "gradient":
                part = np.where(present[group.rows[:, i]][:, None, None], part, np.nan)
            columns[name] += (np.swapaxes(part, 1, 2) if i == group.num_factors - 1 else part,)
    if group.has_initial:
        columns["start_scale"] = group.initial_scales
    else:
        columns["ends"] = tuple(parts[shelf]["end"][places] for shelf, places in (group.places[0], group.places[-1]))
    parameter = group.chains[0].factors[0].parameter
    return Cores(
        scale=group.scales(),
        size=(group.shapes[0][0], group.shapes[-1][1]),
        epsilon=float(torch.finfo(parameter.dtype).eps),
        **columns,
        **known,
    )
