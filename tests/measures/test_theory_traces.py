"""Counts by formula and by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.traces import (
    count_first_step_terms,
    count_scalar_paths,
    count_step_terms,
    count_traces,
    count_updates,
    expand_step,
    factor_graph,
    factor_names,
    scalar_graph,
    walk_paths,
)

DIMS = [
    (4, 2, 3),
    (4, 2, 2, 3),
    (5, 2, 2, 2, 4),
    (4, 2, 2, 2, 2, 3),
    (3, 2, 2, 2, 2, 2, 3),
    (6, 4, 2, 4, 5),
    (5, 3, 4, 2, 3, 4),
    (2, 4, 3),
    (3, 5, 5, 2),
    (1, 1, 1),
]


@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: "-".join(map(str, dims)))
def test_every_formula_is_the_enumeration(dims: tuple[int, ...]) -> None:
    counts = count_traces(dims)
    assert len({count.what for count in counts}) == len(counts)
    for count in counts:
        assert count.enumerated == count.by_formula, count


@pytest.mark.parametrize(("num_inner", "total"), [(0, 3), (1, 7), (2, 15), (3, 31), (4, 63)])
def test_terms_of_a_step(num_inner: int, total: int) -> None:
    words = expand_step(num_inner)
    assert len(words) == len(set(words)) == sum(count_step_terms(num_inner)) == total
    assert min(map(count_updates, words)) == 1
    assert len([word for word in words if count_updates(word) == 1]) == num_inner + 2
    assert [word for word in words if count_updates(word) == num_inner + 2] == [
        tuple(f"d{name}" for name in factor_names(num_inner))
    ]


def test_terms_by_hand() -> None:
    assert sorted(expand_step(0)) == [("A", "dB"), ("dA", "B"), ("dA", "dB")]
    assert count_step_terms(3) == (5, 10, 10, 5, 1)


def test_the_expansion_sums_to_the_step() -> None:
    rng = np.random.default_rng(0)
    names = factor_names(2)
    letters = {}
    for name, size in zip(names, itertools.pairwise((4, 2, 3, 2, 5)), strict=True):
        letters[name], letters[f"d{name}"] = rng.standard_normal(size), rng.standard_normal(size)
    step = np.linalg.multi_dot([letters[n] + letters[f"d{n}"] for n in names])
    step -= np.linalg.multi_dot([letters[n] for n in names])
    total = sum(np.linalg.multi_dot([letters[letter] for letter in word]) for word in expand_step(2))
    np.testing.assert_allclose(total, step, rtol=0, atol=1e-12 * np.linalg.norm(step))


@pytest.mark.parametrize("num_inner", range(6))
def test_every_factor_has_one_path(num_inner: int) -> None:
    graph = factor_graph(num_inner)
    for name in factor_names(num_inner):
        (path,) = walk_paths(graph, "loss", name)
        # B hangs on the last product; every factor before it lies behind one product more, A and W1 on the first.
        first = {"A": 1}.get(name, factor_names(num_inner).index(name))
        assert path == ("loss", "y", "delta", *(f"P{i}" for i in range(num_inner + 1, first - 1, -1)), name)


def test_walking_finds_several_paths_where_there_are() -> None:
    diamond = {"in": ["a", "b"], "a": ["c"], "b": ["c", "out"], "c": ["out"]}
    assert sorted(walk_paths(diamond, "in", "out")) == [
        ("in", "a", "c", "out"),
        ("in", "b", "c", "out"),
        ("in", "b", "out"),
    ]
    assert not list(walk_paths(diamond, "out", "in"))
    paths = list(walk_paths(scalar_graph((2, 1, 3)), "input", "output"))
    assert len(set(paths)) == len(paths) == count_scalar_paths((2, 1, 3)) == 6


def test_scalar_paths_are_the_products_of_entries() -> None:
    """With ones for all entries every product is 1, and the entries of ΔW sum to their number."""
    dims = (3, 2, 4, 2)
    ones = np.linalg.multi_dot([np.ones(size) for size in itertools.pairwise(dims)])
    assert ones.sum() == count_scalar_paths(dims)


def test_one_factor_moves_at_the_start() -> None:
    for dims in DIMS:
        assert count_first_step_terms(dims, np.random.default_rng(1)) == 1


def test_a_large_chain_is_counted_by_formula_alone() -> None:
    counts = {count.what: count for count in count_traces((4096, 16, 16, 16, 16, 4096))}
    scalar = counts["scalar paths from input to output"]
    assert (scalar.by_formula, scalar.enumerated) == (4096**2 * 16**4, None)
    directions = counts["directions in which ΔW can move"]
    assert (directions.by_formula, directions.enumerated) == (16 * (8192 - 16), None)
    assert counts["parameters"].by_formula == 2 * 4096 * 16 + 3 * 256
    assert counts["of them redundant (gauge)"].by_formula == 4 * 256
    assert counts["gradient paths from the loss to all factors"].enumerated == 5


@pytest.mark.parametrize("dims", [(12, *[8] * 14, 12), (4, *[2] * 90, 3), (8, *[8, 16] * 10, 9)])
def test_ranks_of_long_chains_are_those_of_the_formula(dims: tuple[int, ...]) -> None:
    for seed in range(3):
        for count in count_traces(dims, seed)[-4:]:
            assert count.enumerated == count.by_formula, count


def test_a_rank_that_rounding_hides_is_not_given() -> None:
    """The second singular value of a chain that is narrow and wide by turns falls below any rounding of the first."""
    for seed in range(3):
        counts = {count.what: count for count in count_traces((4, *[2, 16] * 60, 3), seed)}
        for name in ("directions in which ΔW can move", "the same at B = 0", "of them redundant (gauge)"):
            assert counts[name].enumerated is None
        assert counts["parameters"].enumerated == counts["parameters"].by_formula


def test_an_expansion_that_is_too_long_is_counted_by_formula_alone() -> None:
    counts = {count.what: count for count in count_traces((2, *[1] * 41, 2))}
    assert (counts["terms of all orders"].by_formula, counts["terms of all orders"].enumerated) == (2**42 - 1, None)
    assert counts["terms of order 2 of an expanded step"].enumerated is None
    assert counts["gradient paths from the loss to all factors"].enumerated == 42
    far = {count.what: count for count in count_traces((2, *[1] * 300, 2))}
    assert far["gradient paths from the loss to all factors"].enumerated is None
    with pytest.raises(InputError, match="count the terms with count_step_terms"):
        expand_step(15)
    for wrong in (-1, 2.0, "a", True):
        with pytest.raises(InputError, match="num_inner: expected a whole number from 0 on"):
            expand_step(wrong)  # type: ignore[arg-type]


def test_a_map_that_does_not_fit_is_counted_by_formula_alone() -> None:
    counts = {count.what: count for count in count_traces(tuple(np.int64(size) for size in (2**32, 2**16, 2**32)))}
    assert counts["scalar paths from input to output"].by_formula == 2**80  # which NumPy's own numbers do not hold
    assert counts["first-order terms of a step that are not 0 at B = 0"].enumerated is None


@pytest.mark.parametrize(
    "dims", [(), (4, 4), (4, 0, 4), (4, 3.5, 4), (4, "a", 4), (4, True, 4), "484", 5, None, (4, np.nan, 4)]
)
def test_sizes_that_are_no_chain(dims: object) -> None:
    with pytest.raises(InputError, match="d_in, w_0"):
        count_traces(dims)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 0.5, "a", None])
def test_seeds_that_are_none(seed: object) -> None:
    with pytest.raises(InputError, match="seed: expected a whole number from 0 on"):
        count_traces((4, 2, 3), seed)  # type: ignore[arg-type]
