from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain_cores import Array, FullChain, Shape, every_shape, factor_gradients, product, random_chain, small_cores
from chain_cores import start_squares as squares_of
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.balance import measure_balance, squares

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def by_definition(chain: FullChain, start: list[Array], rates: list[float]) -> tuple[list[float], list[float]]:
    """Drift and imbalance of each pair, with 1/η in front of the squares as in the invariant itself."""
    drift, imbalance = [], []
    for i in range(len(start) - 1):
        now = [chain.after[i].T @ chain.after[i] / rates[i], chain.after[i + 1] @ chain.after[i + 1].T / rates[i + 1]]
        then = [start[i].T @ start[i] / rates[i], start[i + 1] @ start[i + 1].T / rates[i + 1]]
        size = np.linalg.norm(now[0]) + np.linalg.norm(now[1])
        drift.append(float(np.linalg.norm((now[0] - now[1]) - (then[0] - then[1])) / size))
        imbalance.append(float(np.linalg.norm(now[0] - now[1]) / size))
    return drift, imbalance


@every_shape
@pytest.mark.parametrize("equal", [True, False])
def test_both_columns_against_their_definition(shape: Shape, equal: bool) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape, moved=0.3) for _ in range(2)]
    rates = [1.0] * len(chains[0].before) if equal else list(10.0 ** rng.uniform(-3, 1, len(chains[0].before)))
    starts = [chain.start or [] for chain in chains]
    cores, _ = small_cores(chains, start_squares=squares_of(starts), learning_rate=np.array([rates, rates]))
    values = measure_balance(cores)
    without_rates = measure_balance(replace(cores, learning_rate=None))
    for j, (chain, start) in enumerate(zip(chains, starts, strict=True)):
        drift, imbalance = by_definition(chain, start, rates)
        np.testing.assert_allclose(values["balance_drift"][j], drift, rtol=1e-10)
        np.testing.assert_allclose(values["imbalance"][j], imbalance, rtol=1e-10)
    if equal:
        np.testing.assert_array_equal(values["balance_drift"], without_rates["balance_drift"])
        np.testing.assert_array_equal(values["imbalance"], without_rates["imbalance"])


@every_shape
def test_squares_are_those_of_the_full_factors(shape: Shape) -> None:
    chain = random_chain(np.random.default_rng(1), shape)
    cores, _ = small_cores([chain])
    for i in range(len(chain.before) - 1):
        left, right = squares(cores.before, i)
        np.testing.assert_allclose(left[0], chain.before[i].T @ chain.before[i], atol=1e-13)
        np.testing.assert_allclose(right[0], chain.before[i + 1] @ chain.before[i + 1].T, atol=1e-13)


def descend(learning_rate: float, relative_rates: list[float], time: float = 1.0) -> tuple[FullChain, list[Array]]:
    """Descend ½‖ΔW − T‖² with a rate per factor for a fixed time; return the last step and the start."""
    rng = np.random.default_rng(2)
    first = random_chain(rng, (8, (3, 3), 7), scale=2.0)
    target = rng.standard_normal((8, 7))
    factors = first.before
    change = [np.zeros_like(factor) for factor in factors]
    for _ in range(round(time / learning_rate)):
        factors = [factor + step for factor, step in zip(factors, change, strict=True)]
        gradients = factor_gradients(factors, 2.0 * product(factors) - target, 2.0)
        change = [-learning_rate * rate * g for rate, g in zip(relative_rates, gradients, strict=True)]
    return FullChain(factors, change, gradients, 2.0), first.before


@pytest.mark.parametrize("relative_rates", [[1.0, 1.0, 1.0], [0.25, 1.0, 3.0]])
def test_gradient_descent_conserves_balance_up_to_its_step(relative_rates: list[float]) -> None:
    """At a fixed time the drift is proportional to the learning rate, with the rates of the factors in their places."""
    drifts, unweighted = [], []
    for learning_rate in (5e-4, 1e-4):
        chain, start = descend(learning_rate, relative_rates, time=0.5)
        rates = learning_rate * np.array([relative_rates])
        cores, _ = small_cores([chain], start_squares=squares_of([start]), learning_rate=rates)
        drifts.append(measure_balance(cores)["balance_drift"][0])
        unweighted.append(measure_balance(replace(cores, learning_rate=None))["balance_drift"][0])
    assert (drifts[1] < 1e-2).all()
    # 5 up to what is of second order in the learning rate: a few percent at 5e-4
    np.testing.assert_allclose(drifts[0] / drifts[1], 5, rtol=0.1)
    if len(set(relative_rates)) > 1:  # the invariant of equal rates is none here
        assert (unweighted[1] > 10 * drifts[1]).all()
        np.testing.assert_allclose(unweighted[0], unweighted[1], rtol=0.1)


def test_rates_that_are_zero_or_unknown_weigh_alike() -> None:
    rng = np.random.default_rng(3)
    chain = random_chain(rng, (8, (3, 3), 7), moved=0.2)
    assert chain.start is not None
    cores, _ = small_cores([chain], start_squares=squares_of([chain.start]))
    alike = measure_balance(cores)
    for rates in (
        [0.0, 0.0, 0.0],
        [np.nan, np.nan, np.nan],
        [0.0, 1e-3, 0.0],
        [1e-3, np.nan, 1e-3],
        [np.inf, 1, np.inf],
    ):
        values = measure_balance(replace(cores, learning_rate=np.array([rates])))
        np.testing.assert_array_equal(values["balance_drift"], alike["balance_drift"])
        np.testing.assert_array_equal(values["imbalance"], alike["imbalance"])


def test_balanced_and_empty_factors() -> None:
    """A = UD, B = DVᵀ are balanced; B = 0 is as unbalanced as can be; two zeros have no balance."""
    rng = np.random.default_rng(4)
    u, v = np.linalg.qr(rng.standard_normal((8, 3)))[0], np.linalg.qr(rng.standard_normal((7, 3)))[0]
    d = np.diag([3.0, 1.0, 0.2])
    still = [np.zeros((8, 3)), np.zeros((3, 7))]
    factors = ([u @ d, d @ v.T], [u @ d, still[1]], [still[0], d @ v.T], still)
    chains = [FullChain(list(pair), still, still) for pair in factors]
    cores, _ = small_cores(chains, start_squares=squares_of([chain.before for chain in chains]))
    values = measure_balance(cores)
    np.testing.assert_allclose(values["imbalance"][:, 0], [0, 1, 1, np.nan], atol=1e-14)
    np.testing.assert_allclose(values["balance_drift"][:, 0], [0, 0, 0, np.nan], atol=1e-14)


def test_a_drift_computed_by_hand() -> None:
    """a = 1 → 2 and b = 3 stays: a² − b² changes by 3, relative to 4 + 9; with η = (2, 1): 3/2 of 4/2 + 9."""
    one = [np.ones((1, 1)), 3 * np.ones((1, 1))]
    chain = FullChain(one, [np.ones((1, 1)), np.zeros((1, 1))], one)
    cores, _ = small_cores([chain], start_squares=squares_of([one]))
    assert measure_balance(cores)["balance_drift"] == pytest.approx(3 / 13, rel=1e-14)
    assert measure_balance(cores)["imbalance"] == pytest.approx(5 / 13, rel=1e-14)
    rates = replace(cores, learning_rate=np.array([[2.0, 1.0]]))
    assert measure_balance(rates)["balance_drift"] == pytest.approx(1.5 / 11, rel=1e-14)
    assert measure_balance(rates)["imbalance"] == pytest.approx(7 / 11, rel=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.floats(1e-6, 1e3), min_size=5, max_size=5),
    st.floats(1e-3, 1e3),
)
def test_range_and_dependence_on_ratios_of_rates_only(
    seed: int, widths: list[int], rates: list[float], size: float
) -> None:
    chain = random_chain(np.random.default_rng(seed), (5, tuple(widths), 4), moved=1.0)
    assert chain.start is not None
    rate = np.array([rates[: len(chain.before)]])
    cores, _ = small_cores([chain], start_squares=squares_of([chain.start]), learning_rate=rate)
    values = measure_balance(cores)
    scaled = measure_balance(replace(cores, learning_rate=size * rate))
    assert ((values["imbalance"] >= 0) & (values["imbalance"] <= 1 + 1e-14)).all()
    assert (values["balance_drift"] >= 0).all()
    for name in values:
        np.testing.assert_allclose(scaled[name], values[name], rtol=1e-10, atol=1e-14)
