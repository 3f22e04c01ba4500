from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from chain_cores import SHAPES, Array, Shape, change_gauge, complete_cores, every_shape, product, random_chain, sides
from chain_cores import small_cores as small
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from linchain_analysis.measures import cores as c
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import Measure, all_measures
from linchain_analysis.vocabulary import Column

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

MEASURES = {
    name: found
    for name, found in all_measures().items()
    if found.level != "reading" and found.function.__module__.startswith("linchain_analysis.")
}
every_measure = pytest.mark.parametrize("found", list(MEASURES.values()), ids=list(MEASURES))


def three_chains(shape: Shape, **known: Any) -> list[Any]:
    rng = np.random.default_rng(5)
    return [random_chain(rng, shape, **known) for _ in range(3)]


@cache
def whole_cores(shape: Shape, moved: float | None = None) -> Cores:
    """Cores with everything that measures ask for, of the same three chains; tests copy what they change."""
    return complete_cores(three_chains(shape, moved=moved))


@cache
def turned_cores(shape: Shape, moved: float | None) -> Cores:
    """The same in another gauge."""
    rng = np.random.default_rng(8)
    # 0.5 … 2 in turned directions: far from the identity, and cond(M) ≤ 4, so that a few digits at most are lost.
    gauges = [
        np.linalg.qr(rng.standard_normal((w, w)))[0]
        @ np.diag(np.geomspace(0.5, 2, w))
        @ np.linalg.qr(rng.standard_normal((w, w)))[0]
        for w in shape[1]
    ]
    return complete_cores([change_gauge(chain, gauges) for chain in three_chains(shape, moved=moved)])


def columns_and_values(found: Measure, cores: Cores) -> Iterator[tuple[Column, Array]]:
    values = found.function(cores)
    assert set(values) == {column.name for column in found.columns}
    for column in found.columns:
        yield column, np.asarray(values[column.name])


# --- the chain in small coordinates ---------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("moved", [None, 0.5])
def test_delta_and_update_are_those_of_the_full_chain(shape: Shape, moved: float | None) -> None:
    chains = three_chains(shape, moved=moved)
    cores, bases = small(chains)
    assert (len(cores), cores.num_factors) == (3, len(shape[1]) + 1)
    for chain, basis, delta, update in zip(chains, bases, cores.delta, cores.update, strict=True):
        size = np.linalg.norm(chain.delta)
        np.testing.assert_allclose(basis.lift(delta), chain.delta, rtol=0, atol=1e-13 * size)
        np.testing.assert_allclose(basis.lift(update), chain.update, rtol=0, atol=1e-13 * size)


def test_delta_uses_each_scale_at_its_own_time() -> None:
    """The scale was changed during training; without a record of the first one, the present one stands for both."""
    chain = random_chain(np.random.default_rng(0), SHAPES["n=2"], moved=1.0)
    cores, (basis,) = small([chain])
    assert chain.start is not None
    np.testing.assert_allclose(
        basis.lift(cores.delta[0]), 2.0 * product(chain.after) - 1.5 * product(chain.start), rtol=0, atol=1e-12
    )
    same = replace(cores, start_scale=None)
    np.testing.assert_allclose(
        basis.lift(same.delta[0]), 2.0 * (product(chain.after) - product(chain.start)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("step", [1e-3, 1e-9, 1e-15])
def test_a_small_step_keeps_its_digits(step: float) -> None:
    """To first order it is Σ L_i dF_i R_i, with an error of relative size `step`; a difference of products has none."""
    chain = random_chain(np.random.default_rng(1), SHAPES["n=3"], step=step)
    cores, (basis,) = small([chain])
    linear = 2.0 * sum(left @ d @ right for (left, right), d in zip(sides(chain.before), chain.change, strict=True))
    error = np.linalg.norm(basis.lift(cores.update[0]) - linear) / np.linalg.norm(linear)
    assert error < 20 * step + 1e-13


@every_shape
def test_partial_products_leave_out_their_factor(shape: Shape) -> None:
    chain = random_chain(np.random.default_rng(2), shape)
    factors = [factor[None] for factor in chain.before]
    terms = c.first_order_terms(factors, [factor[None] for factor in chain.change])
    for (left, right), found_left, found_right, change, term in zip(
        sides(chain.before), c.prefixes(factors), c.suffixes(factors), chain.change, terms, strict=True
    ):
        np.testing.assert_allclose(np.eye(shape[0]) if found_left is None else found_left[0], left, atol=1e-13)
        np.testing.assert_allclose(np.eye(shape[2]) if found_right is None else found_right[0], right, atol=1e-13)
        np.testing.assert_allclose(term[0], left @ change @ right, atol=1e-13)


def test_norm_ratio_and_cosine_of_special_numbers() -> None:
    stack = np.zeros((5, 2, 2))
    stack[1, 0] = [3e200, 4e200]
    stack[2, 0] = [3e-200, 4e-200]
    stack[3, 0, 0] = np.nan
    stack[4] = [[np.inf, 1e200], [0, 0]]
    np.testing.assert_allclose(c.norm(stack), [0, 5e200, 5e-200, np.nan, np.inf], rtol=1e-15)
    np.testing.assert_array_equal(c.norm(np.zeros((2, 0, 3))), [0, 0])
    np.testing.assert_array_equal(c.ratio([1, 0, 1, np.inf, 1, np.nan], [2, 0, 0, 1, np.inf, 1]), [0.5] + [np.nan] * 5)
    np.testing.assert_array_equal(c.ratio([1, -1e300], [1e-320, 1e-300]), [np.inf, -np.inf])
    np.testing.assert_allclose(c.cosine(stack, stack), [np.nan, 1, 1, np.nan, np.nan], rtol=1e-15)
    largest = np.full((1, 2, 2), np.finfo(np.float64).max)  # finite, but its norm is not
    assert np.isnan(c.cosine(largest, largest)).all()
    assert c.cosine(stack[1:2], -stack[2:3]) == pytest.approx(-1, rel=1e-15)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (2, 3, 2), elements=st.floats(-1e3, 1e3, allow_subnormal=False)), st.floats(-300, 300))
def test_norm_and_cosine_do_not_depend_on_size(pair: Array, power: float) -> None:
    size = 2.0 ** round(power)  # a power of two, so that only the measures could round
    np.testing.assert_allclose(c.norm(pair * size), c.norm(pair) * size, rtol=1e-14)
    a, b = pair[:1], pair[1:]
    np.testing.assert_allclose(c.cosine(a * size, b), c.cosine(a, b), rtol=0, atol=1e-14)
    assert not np.abs(c.cosine(a, b)) > 1 + 1e-14
    # 1e-9: squares of norms near the smallest numbers of this range hold fewer digits
    np.testing.assert_allclose(c.inner_product(a, a), c.norm(a) ** 2, rtol=1e-9, atol=1e-300)


# --- what holds for every measure -----------------------------------------------------------------------------------


@every_shape
@every_measure
@pytest.mark.parametrize("moved", [None, 0.5])
def test_values_have_a_row_per_chain_and_an_entry_per_factor_or_link(
    found: Measure, shape: Shape, moved: float | None
) -> None:
    cores = whole_cores(shape, moved)
    entries = {"modules": (), "factors": (cores.num_factors,), "links": (cores.num_factors - 1,)}
    for column, values in columns_and_values(found, cores):
        listed = column.kind in ("spectrum", "values")
        assert values.dtype == np.float64
        assert values.shape[: values.ndim - listed] == (3, *entries[column.table]), column.name
        if moved is None or "data_weighted" not in column.name:
            assert np.isfinite(values).all(), column.name
        if column.kind == "spectrum":
            assert not (np.diff(values, axis=-1) > 0).any(), column.name


@every_shape
@every_measure
def test_what_was_not_supplied_is_nan(found: Measure, shape: Shape) -> None:
    cores = whole_cores(shape)
    full = found.function(cores)
    missing = replace(cores, gradient=None, tokens=None, base_norm=None, learning_rate=None, start_squares=())
    for column, values in columns_and_values(found, missing):
        assert values.shape == full[column.name].shape
        if found.needs and column.name != "imbalance":  # which needs nothing of the start
            assert np.isnan(values).all(), column.name


@every_shape
@every_measure
@pytest.mark.parametrize("moved", [None, 0.5])
def test_only_what_says_so_depends_on_the_gauge(found: Measure, shape: Shape, moved: float | None) -> None:
    expected = found.function(whole_cores(shape, moved))
    turned = turned_cores(shape, moved)
    for column, values in columns_and_values(found, turned):
        if column.gauge_dependent:
            changed = ~np.isclose(values, expected[column.name], rtol=1e-3, equal_nan=True)
            assert changed.any(), f"{column.name} does not depend on the gauge"
        else:
            # 1e-9 and not 1e-10: condition numbers of these chains reach 1e3, and those of M come on top
            np.testing.assert_allclose(values, expected[column.name], rtol=1e-9, atol=1e-12, err_msg=column.name)


@every_measure
@pytest.mark.parametrize("shape", ["n=0", "n=1", "8-16-8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_chain_leaves_its_neighbours_alone(found: Measure, shape: str, bad: float) -> None:
    for where in ("before", "change", "gradient", "since_start", "learning_rate", "base_norm", "tokens"):
        break_one_chain(found, shape, bad, where)


def break_one_chain(found: Measure, shape: str, bad: float, where: str) -> None:
    cores = whole_cores(SHAPES[shape], 0.5 if where == "since_start" else None)
    held = getattr(cores, where)
    if isinstance(held, tuple):
        for i in range(len(held)):
            broken = held[i].copy()
            broken[1, -1, 0] = bad
            replaced = (*held[:i], broken, *held[i + 1 :])
            check_neighbours(found, cores, replace(cores, **{where: replaced}), all_nan=where in ("before", "change"))
    elif where == "tokens":
        broken = {field.name: getattr(held, field.name).copy() for field in fields(held)}
        for array in broken.values():
            array[1] = bad
        check_neighbours(found, cores, replace(cores, tokens=replace(held, **broken)), all_nan=False)
    else:
        broken = held.copy()
        broken[1] = bad
        check_neighbours(found, cores, replace(cores, **{where: broken}), all_nan=False)


def check_neighbours(found: Measure, whole: Cores, broken: Cores, *, all_nan: bool) -> None:
    expected = found.function(whole)
    for column, values in columns_and_values(found, broken):
        np.testing.assert_array_equal(values[[0, 2]], expected[column.name][[0, 2]], err_msg=column.name)
        if all_nan and column.table == "modules" and "tokens" not in found.needs:
            assert np.isnan(values[1]).all(), column.name


@every_measure
@pytest.mark.parametrize("shape", ["n=0", "n=2", "n=4"])
@pytest.mark.parametrize("size", [1e150, 1e-150, 1e60, 1e-60], ids=str)
def test_pure_numbers_do_not_depend_on_size_or_are_nan(found: Measure, shape: str, size: float) -> None:
    """All factors, updates and gradients times `size`: what over- or underflows is lost, and never another number."""
    cores = whole_cores(SHAPES[shape])
    expected = found.function(cores)
    assert cores.tokens is not None
    assert cores.gradient is not None
    scaled = replace(
        cores,
        before=tuple(size * factor for factor in cores.before),
        change=tuple(size * factor for factor in cores.change),
        gradient=tuple(size * factor for factor in cores.gradient),
        start_squares=tuple((a * size * size, b * size * size) for a, b in cores.start_squares),
        tokens=replace(cores.tokens, inputs=size * cores.tokens.inputs),
        base_norm=None,
    )
    vanishes = not scaled.delta.any()
    for column, values in columns_and_values(found, scaled):
        if column.unit in ("1", "directions") and column.name not in ("relative_delta", "relative_update"):
            lost = np.isnan(values) | (vanishes & (values == 0) & column.name.endswith("numerical_rank"))
            same = np.isclose(values, expected[column.name], rtol=1e-9, atol=1e-12)
            assert (same | lost).all(), column.name
            if shape == "n=0" or column.name.startswith(("imbalance", "balance_drift", "grad_", "preconditioner")):
                assert same.all(), column.name


@every_shape
@every_measure
def test_nothing_is_measured_of_nothing(found: Measure, shape: Shape) -> None:
    """All zero: ranks, cosines and shares are undefined, norms and counts are 0."""
    cores = whole_cores(shape)
    assert cores.gradient is not None
    assert cores.tokens is not None
    zero = replace(
        cores,
        before=tuple(np.zeros_like(factor) for factor in cores.before),
        change=tuple(np.zeros_like(factor) for factor in cores.change),
        gradient=tuple(np.zeros_like(factor) for factor in cores.gradient),
        start_squares=tuple((np.zeros_like(a), np.zeros_like(b)) for a, b in cores.start_squares),
        tokens=type(cores.tokens)(
            **{field.name: np.zeros_like(getattr(cores.tokens, field.name)) for field in fields(cores.tokens)}
        ),
    )
    zeros = {
        "preconditioner_largest",
        "preconditioner_rank",
        "numerical_rank",
        "delta_update_numerical_rank",
        "relative_delta",
        "relative_update",
        "full_grad_norm",
        "grad_spectrum",
    }
    for column, values in columns_and_values(found, zero):
        expected = np.zeros(values.shape) if column.name in zeros else np.full(values.shape, np.nan)
        if column.name == "prefix_condition":
            expected[:, 0] = 1
        if column.name == "suffix_condition":
            expected[:, -1] = 1
        np.testing.assert_array_equal(values, expected, err_msg=column.name)
