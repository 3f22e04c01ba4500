from __future__ import annotations

import itertools

import numpy as np
import pytest
from chain_cores import Array, FullChain, Shape, every_shape, product, random_chain, sides, small_cores
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.orders import measure_orders, order_terms

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def enumerated_terms(chain: FullChain) -> list[Array]:
    """Sum, by their number, over all subsets of factors that stand with their update."""
    m = len(chain.before)
    terms = [np.zeros(chain.size) for _ in range(m + 1)]
    for subset in itertools.product((False, True), repeat=m):
        picked = [chain.change[i] if moves else chain.before[i] for i, moves in enumerate(subset)]
        terms[sum(subset)] += chain.scale * product(picked)
    return terms[1:]


def share(part: Array, whole: Array) -> float:
    return float((part * whole).sum() / (whole**2).sum())


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@every_shape
@pytest.mark.parametrize("step", [10.0, 0.1, 1e-7])
def test_every_column_against_the_enumeration_of_subsets(shape: Shape, step: float) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape, step=step, scale=scale) for scale in (2.0, -0.5)]
    cores, bases = small_cores(chains)
    values = measure_orders(cores)
    orders = order_terms(cores)
    for j, (chain, basis) in enumerate(zip(chains, bases, strict=True)):
        terms = enumerated_terms(chain)
        # Each term is formed from its own products, so that also the smallest, of relative size step^(m - 1), is exact.
        for found, term in zip(orders, terms, strict=True):
            np.testing.assert_allclose(basis.lift(found[j]), term, rtol=0, atol=1e-12 * np.linalg.norm(term))
        update = sum(terms)
        size = np.linalg.norm(update)
        own = [
            chain.scale * left @ change @ right
            for (left, right), change in zip(sides(chain.before), chain.change, strict=True)
        ]
        expected = {
            "order_ratios": [np.linalg.norm(term) / size for term in terms],
            "first_order_share": share(terms[0], update),
            "interaction_ratio": np.linalg.norm(sum(terms[1:])) / size,
            "first_order_cosine": cosine(terms[0], update),
            "own_share": [share(part, update) for part in own],
            "own_cosine": [cosine(part, update) for part in own],
        }
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(values[name][j], value, rtol=1e-10, atol=1e-13, err_msg=name)


def test_a_step_computed_by_hand() -> None:
    """A = 1 and B = 2 become 1.5 and 3: dΔW = 2.5 = 0.5 · 2 + 1 · 1 + 0.5 · 1."""
    one = np.ones((1, 1, 1))
    values = measure_orders(Cores(np.ones(1), (one, 2 * one), (0.5 * one, one), (1, 1)))
    np.testing.assert_allclose(values["order_ratios"], [[2 / 2.5, 0.5 / 2.5]], rtol=1e-15)
    np.testing.assert_allclose(values["own_share"], [[1 / 2.5, 1 / 2.5]], rtol=1e-15)
    np.testing.assert_allclose(values["first_order_share"], [2 / 2.5], rtol=1e-15)
    np.testing.assert_allclose(values["interaction_ratio"], [0.5 / 2.5], rtol=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1e-8, 1e-2, 1.0, 1e3]),
)
def test_sums_of_shares(seed: int, widths: list[int], d_in: int, d_out: int, step: float) -> None:
    cores, _ = small_cores([random_chain(np.random.default_rng(seed), (d_in, tuple(widths), d_out), step=step)])
    values = measure_orders(cores)
    total = values["order_ratios"].sum(axis=-1)
    # Terms larger than their sum cancel in it, and so do their digits.
    rounding = 1e-13 * total.max() * np.linalg.norm(values["order_ratios"])
    shares = [np.sum(term * cores.update) / np.sum(cores.update**2) for term in order_terms(cores)]
    assert sum(shares) == pytest.approx(1, abs=rounding)
    np.testing.assert_allclose(values["first_order_share"], values["own_share"].sum(axis=-1), rtol=0, atol=rounding)
    np.testing.assert_allclose(values["first_order_share"], shares[0], rtol=0, atol=rounding)
    assert total >= 1 - rounding  # triangle inequality
    assert (values["interaction_ratio"] >= np.abs(1 - values["first_order_share"]) - rounding).all()
    for name in ("first_order_cosine", "own_cosine"):
        assert not (np.abs(values[name]) > 1 + 1e-14).any()
    # cos ‖C_1‖/‖dΔW‖ is the share.
    np.testing.assert_allclose(
        values["first_order_cosine"] * values["order_ratios"][:, 0],
        values["first_order_share"],
        rtol=0,
        atol=rounding,
    )


@every_shape
def test_the_first_step_from_b_equal_to_zero_is_the_step_of_b_alone(shape: Shape) -> None:
    """B = 0 and only B moves, as in the first step of LoRA: all of the update is B's own, and nothing interacts."""
    rng = np.random.default_rng(3)
    chain = random_chain(rng, shape)
    chain.before[-1][:] = 0
    for change in chain.change[:-1]:
        change[:] = 0
    values = measure_orders(small_cores([chain])[0])
    m = len(chain.before)
    np.testing.assert_allclose(values["own_share"], [[0.0] * (m - 1) + [1.0]], rtol=0, atol=1e-14)
    np.testing.assert_allclose(values["own_cosine"], [[np.nan] * (m - 1) + [1.0]], rtol=1e-14)
    np.testing.assert_allclose(values["order_ratios"], [[1.0] + [0.0] * (m - 1)], rtol=0, atol=1e-14)
    np.testing.assert_allclose(values["interaction_ratio"], [0], atol=1e-14)


def test_no_update_has_no_shares() -> None:
    rng = np.random.default_rng(4)
    shape = (9, (4, 4), 7)
    still, moving = random_chain(rng, shape, step=0), random_chain(rng, shape)
    values = measure_orders(small_cores([still, moving])[0])
    for name, value in values.items():
        assert np.isnan(value[0]).all(), name
        assert np.isfinite(value[1]).all(), name


def test_orders_tell_rescaling_from_learning() -> None:
    """A → 2A, B → B/2 moves nothing: the terms are large and cancel, and no share of the zero update is a number."""
    rng = np.random.default_rng(5)
    chain = random_chain(rng, (6, (3,), 5))
    chain.change[0][:] = chain.before[0]
    chain.change[1][:] = -chain.before[1] / 2
    cores, _ = small_cores([chain])
    first, second = order_terms(cores)
    np.testing.assert_allclose(first, -second, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cores.update, 0, atol=1e-14)
