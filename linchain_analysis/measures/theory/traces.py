"""What "number of optimisation traces" can mean: every count by its formula, and by enumeration for small chains.

The paper (arXiv 2411.00039, section 3.2) says that the number of paths from the loss to the parameters grows
exponentially with n, without a count. Each function here counts one exact thing. The enumerations walk graphs, expand
products and take numerical ranks; they share no arithmetic with the formulas.

Legend: n inner factors, m = n + 2 factors, dims = (d_in, w_0, …, w_n, d_out).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb, prod
from numbers import Integral

import numpy as np

from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.theory.gradients import factor_gradients, multiply_chain
from linchain_analysis.measures.theory.initial_factors import draw_orthogonal
from linchain_analysis.measures.theory.tangent import (
    count_parameters,
    draw_generic_factors,
    first_step_rank,
    gauge_dimension,
    jacobian,
    tangent_rank,
)

Graph = Mapping[Hashable, Sequence[Hashable]]
_MOST_PATHS = 200_000  # that are walked one by one, about a tenth of a second
_MOST_COPIED = 100_000_000  # nodes, as a path is copied at each of its own
_MOST_ENTRIES = 5_000_000  # of a Jacobian whose rank is taken, a few seconds
_MOST_DRAWN = 50_000_000  # entries of factors and gradient that are drawn, about two seconds and 400 MB
_MOST_WORDS = 70_000  # of an expanded step, about a tenth of a second; a chain of n = 14 has 65535
_MOST_GRAPH = 100  # inner factors of a graph that is walked, about a tenth of a second


@dataclass(frozen=True)
class TraceCount:
    """One thing that can be counted.

    Attributes:
        what: What is counted.
        formula: Its formula.
        growth: How it grows with the number of inner factors, the other sizes as they are.
        by_formula: The number that the formula gives.
        enumerated: The number found by enumeration; None where the chain is too large for one, or where a rank cannot
            be told in float64.
    """

    what: str
    formula: str
    growth: str
    by_formula: int
    enumerated: int | None


def factor_names(num_inner: int) -> list[str]:
    """Return A, W1, …, Wn, B."""
    return ["A", *(f"W{i}" for i in range(1, num_inner + 1)), "B"]


def factor_graph(num_inner: int) -> Graph:
    """Return the graph of the backward pass with matrices as nodes, from the loss to the factors.

    Products are taken one after the other, P_1 = A W1, P_2 = P_1 W2, …; each sends its gradient to its two operands.
    """
    names = factor_names(num_inner)
    last = f"P{num_inner + 1}"
    graph: dict[Hashable, list[Hashable]] = {"loss": ["y"], "y": ["W0", "delta"], "delta": [last]}
    for i, name in enumerate(names[1:], start=1):
        graph[f"P{i}"] = ["A" if i == 1 else f"P{i - 1}", name]
    return graph


def scalar_graph(dims: Sequence[int]) -> Graph:
    """Return the graph of the forward pass with coordinates as nodes (layer, index): an edge is a factor's entry."""
    graph: dict[Hashable, list[Hashable]] = {"input": [(0, j) for j in range(dims[0])]}
    for layer, (rows, columns) in enumerate(pairwise(dims)):
        graph.update({(layer, i): [(layer + 1, j) for j in range(columns)] for i in range(rows)})
    graph.update({(len(dims) - 1, j): ["output"] for j in range(dims[-1])})
    return graph


def walk_paths(graph: Graph, start: Hashable, end: Hashable) -> Iterator[tuple[Hashable, ...]]:
    """Yield every path from `start` to `end` of a graph without cycles, one by one."""
    pending: list[tuple[Hashable, ...]] = [(start,)]
    while pending:
        path = pending.pop()
        if path[-1] == end:
            yield path
            continue
        pending += [(*path, follower) for follower in graph.get(path[-1], ())]


def expand_step(num_inner: int) -> list[tuple[str, ...]]:
    """Return the terms of ∏(F_i + dF_i) − ∏F_i as words such as ("A", "dW1", "B"), multiplied out one by one.

    Raises:
        InputError: A number that is not whole, is below 0, or makes too many words.
    """
    _require_whole("num_inner", num_inner, least=0)
    if not _can_expand(num_inner):
        raise InputError(
            "num_inner",
            expected=f"a chain of {_MOST_WORDS} terms at most",
            got=f"{num_inner} inner factors",
            do="count the terms with count_step_terms",
        )
    words: list[tuple[str, ...]] = [()]
    for name in factor_names(num_inner):
        words = [(*word, letter) for word in words for letter in (name, f"d{name}")]
    words.remove(tuple(factor_names(num_inner)))
    return words


def count_updates(word: Sequence[str]) -> int:
    """Return the order of a term: how many factors stand in it with their update."""
    return sum(letter.startswith("d") for letter in word)


def count_step_terms(num_inner: int) -> tuple[int, ...]:
    """Return C(n + 2, k) for k = 1 … n + 2, the terms of each order of an expanded step; they sum to 2^(n+2) − 1."""
    num_factors = num_inner + 2
    return tuple(comb(num_factors, order) for order in range(1, num_factors + 1))


def count_scalar_paths(dims: Sequence[int]) -> int:
    """Return d_in · w_0 · … · w_n · d_out, the products of entries that make up all of ΔW."""
    return prod(dims)


def count_first_step_terms(dims: Sequence[int], generator: np.random.Generator) -> int:
    """Return how many factors have a gradient that is not 0 at B = 0, for factors and G drawn at random."""
    factors = draw_generic_factors(dims, generator)
    factors[-1][:] = 0
    gradient = generator.standard_normal((dims[0], dims[-1]))
    return sum(bool(found.any()) for found in factor_gradients(factors, gradient))


def count_traces(dims: Sequence[int], seed: int = 0) -> list[TraceCount]:
    """Return every count for a chain of the given sizes.

    Args:
        dims: d_in, w_0, …, w_n, d_out.
        seed: Of the factors whose ranks are taken.

    Raises:
        InputError: Fewer than three sizes, one below 1 or not whole, or a seed that is no whole number of 0 or more.
    """
    dims = _require_dims(dims)
    _require_whole("seed", seed, least=0)
    n = len(dims) - 3
    generator = np.random.default_rng(seed)
    graph, names = factor_graph(n), factor_names(n)
    to_factors = [len(list(walk_paths(graph, "loss", name))) for name in names] if n <= _MOST_GRAPH else None
    by_order = count_step_terms(n)
    words = [count_updates(word) for word in expand_step(n)] if _can_expand(n) else None
    scalar = count_scalar_paths(dims)
    short = scalar <= _MOST_PATHS and scalar * len(dims) ** 2 <= _MOST_COPIED
    walked = sum(1 for _ in walk_paths(scalar_graph(dims), "input", "output")) if short else None
    drawn = count_parameters(dims) + dims[0] * dims[-1]
    moving = count_first_step_terms(dims, generator) if drawn <= _MOST_DRAWN else None
    most, total = (max(to_factors), sum(to_factors)) if to_factors else (None, None)
    counts = [
        TraceCount("gradient paths from the loss to one factor", "1", "constant", 1, most),
        TraceCount("gradient paths from the loss to all factors", "n + 2", "linear", n + 2, total),
        TraceCount("first-order terms of a step that are not 0 at B = 0", "1", "constant", 1, moving),
    ]
    for order, terms in enumerate(by_order, start=1):
        growth = "linear" if order == 1 else f"as n^{order}"
        name = f"terms of order {order} of an expanded step"
        listed = None if words is None else words.count(order)
        counts.append(TraceCount(name, f"C(n + 2, {order})", growth, terms, listed))
    expanded = None if words is None else len(words)
    counts += [
        TraceCount("terms of all orders", "2^(n + 2) − 1", "exponential", 2 ** (n + 2) - 1, expanded),
        TraceCount("scalar paths from input to output", "d_in · w_0 ⋯ w_n · d_out", "exponential", scalar, walked),
        *_count_directions(dims, generator),
    ]
    return counts


def _count_directions(dims: Sequence[int], generator: np.random.Generator) -> list[TraceCount]:
    """Ranks of the Jacobian, at random factors and at B = 0, and what they leave of the parameters."""
    parameters = count_parameters(dims)
    moved = at_start = listed = redundant = None
    if dims[0] * dims[-1] * parameters <= _MOST_ENTRIES:
        # Orthonormal rows or columns: products of square ones keep their singular values, however many they are.
        factors = [draw_orthogonal(shape, generator) for shape in pairwise(dims)]
        listed = sum(factor.size for factor in factors)
        moved = _find_rank(factors, _smallest_value(factors, min(dims)))
        redundant = None if moved is None else listed - moved
        smallest = _smallest_value(factors[:-1], min(dims[:-1]))
        factors[-1][:] = 0
        at_start = _find_rank(factors, smallest)
    rank = "ρ (d_in + d_out − ρ), ρ = min(dims)"
    return [
        TraceCount("directions in which ΔW can move", rank, "constant", tangent_rank(dims), moved),
        TraceCount("the same at B = 0", "min(d_in, w) · d_out", "constant", first_step_rank(dims), at_start),
        TraceCount("parameters", "d_in w_0 + Σ w w′ + w_n d_out", "linear", parameters, listed),
        TraceCount("of them redundant (gauge)", "parameters − directions", "linear", gauge_dimension(dims), redundant),
    ]


def _smallest_value(factors: Sequence[Array], count: int) -> float:
    """The singular value number `count` of a product."""
    return float(np.linalg.svd(multiply_chain(factors), compute_uv=False)[count - 1])


def _find_rank(factors: Sequence[Array], smallest: float) -> int | None:
    """Rank of the Jacobian; None where a direction that ΔW moves in may be lost in rounding.

    Factors of norm 1 at most move ΔW in each of its directions by at least the smallest singular value of their
    product, through A or through B; at B = 0 through B alone, by that of A W1 … Wn.
    """
    values = np.linalg.svd(found := jacobian(factors), compute_uv=False)
    rounding = values[0] * max(found.shape) * np.finfo(np.float64).eps  # as np.linalg.matrix_rank has it
    return int((values > rounding).sum()) if smallest > 100 * rounding else None


def _can_expand(num_inner: int) -> bool:
    return bool(2 ** (num_inner + 2) - 1 <= _MOST_WORDS)


def _require_dims(dims: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes as Python's whole numbers, which do not overflow."""
    known = isinstance(dims, Sequence | np.ndarray) and len(dims) >= 3
    if not known or not all(_is_whole(size) and size >= 1 for size in dims):
        raise InputError(
            "dims",
            expected="d_in, w_0, …, w_n, d_out, each a whole number from 1 on",
            got=repr(dims),
            do="give all sizes",
        )
    return tuple(int(size) for size in dims)


def _require_whole(place: str, value: object, *, least: int) -> None:
    if not _is_whole(value) or int(value) < least:  # type: ignore[call-overload]
        raise InputError(place, expected=f"a whole number from {least} on", got=repr(value), do="give one")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
