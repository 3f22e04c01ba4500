"""Gradient flow: closed forms, what it conserves, and that gradient descent approaches it as its rate goes to 0."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic.batch import ChainStack, Trained, train_chains
from linchain_analysis.training.synthetic.flow import flow_chain
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

PROBLEMS: dict[str, dict[str, Any]] = {
    "whitened": {},
    "samples": {"num_samples": 12, "label_noise": 0.3, "observed": 0.8, "input_decay": 0.5},
    "quartic": {"loss": "quartic"},
}
RATES = (0.01, 0.005, 0.0025)


def draw(**options: Any) -> tuple[LinearMaps, list[np.ndarray]]:
    problem = MapSetting(dim=6, dim_out=5, target_rank=3, **options).draw([0, 1])
    generator = np.random.default_rng(2)
    return problem, [generator.standard_normal(shape) / math.sqrt(shape[0]) for shape in pairwise((6, 4, 3, 5))]


def descend(problem: LinearMaps, factors: list[np.ndarray], rate: float, time: float) -> Trained:
    stack = ChainStack([factor[None] for factor in factors], np.ones(1, dtype=np.intp), np.array([rate]))
    return train_chains(problem, stack, OptimizerSettings("gd"), round(time / rate))


def imbalances(factors: list[np.ndarray]) -> list[np.ndarray]:
    """F_iᵀF_i − F_{i+1}F_{i+1}ᵀ of each pair of neighbours, for a stack of chains."""
    return [a.swapaxes(-1, -2) @ a - b @ b.swapaxes(-1, -2) for a, b in pairwise(factors)]


def drift(factors: list[np.ndarray], start: list[np.ndarray]) -> float:
    pairs = zip(imbalances(factors), imbalances(start), strict=True)
    return max(float(np.abs(now - then).max()) for now, then in pairs)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_balanced_scalar_chain_is_a_logistic_curve(scale: float) -> None:
    """p = s a b, a = b: p' = s² (T − p)(a² + b²) = 2 s p (T − p); p = T p₀ e / (T − p₀ + p₀ e), e = exp(2 s T t)."""
    target, start = 1.5, 0.01
    side = math.sqrt(start / scale)
    times = np.linspace(0.0, 4.0, 9)
    flow = flow_chain(LinearMaps(np.array([[[target]]])), [np.array([[side]])] * 2, times, scale=scale)
    growth = np.exp(2 * scale * target * times)
    product = target * start * growth / (target - start + start * growth)
    np.testing.assert_allclose(flow.delta[:, 0, 0], product, rtol=1e-8)
    np.testing.assert_allclose(flow.delta_spectrum[:, 0], product, rtol=1e-8)
    np.testing.assert_allclose(flow.loss, (product - target) ** 2 / 2, atol=1e-8)
    assert [factor.shape for factor in flow.factors] == [(9, 1, 1)] * 2


def test_one_moving_factor_is_an_exponential() -> None:
    """With A = 1 frozen, b' = T − b."""
    times = [0.5, 2.0]
    problem = LinearMaps(np.array([[[3.0]]]))
    flow = flow_chain(problem, [np.ones((1, 1)), np.zeros((1, 1))], times, trained=[False, True])
    np.testing.assert_allclose(flow.factors[1][:, 0, 0], 3 * (1 - np.exp(-np.array(times))), rtol=1e-8)
    np.testing.assert_array_equal(flow.factors[0], np.ones((2, 1, 1)))


@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
def test_descent_approaches_the_flow_in_proportion_to_its_rate(options: dict[str, Any]) -> None:
    problem, factors = draw(**options)
    flow = flow_chain(problem, factors, [1.0], map=1)
    errors, drifts = [], []
    for rate in RATES:
        end = [factor[0] for factor in descend(problem, factors, rate, 1.0).factors]
        errors.append(max(float(np.abs(a - b[0]).max()) for a, b in zip(end, flow.factors, strict=True)))
        drifts.append(drift(end, factors))
    for values in (errors, drifts):
        orders = [math.log2(one / half) for one, half in pairwise(values)]
        # Of order 1 as the rate goes to 0; the next term is of the relative size of the rate times a few curvatures.
        assert orders == pytest.approx([1.0, 1.0], abs=0.1)
    assert drift([factor[0] for factor in flow.factors], factors) < 1e-4 * drifts[-1]


@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
def test_balance_is_conserved_and_the_loss_falls(options: dict[str, Any]) -> None:
    problem, factors = draw(**options)
    times = np.linspace(0.0, 5.0, 11)
    flow = flow_chain(problem, factors, times, map=1)
    # A local tolerance of 1e-10 an entry and some hundred steps.
    assert drift(flow.factors, [factor[None] for factor in factors]) < 1e-8
    assert (np.diff(flow.loss) < 0).all()
    coarse = flow_chain(problem, factors, times, map=1, rtol=1e-4, atol=1e-4)
    assert drift(coarse.factors, [factor[None] for factor in factors]) > 1e-8  # so the bound above is not idle
    for factor, start in zip(flow.factors, factors, strict=True):
        np.testing.assert_array_equal(factor[0], start)


def test_a_frozen_factor_takes_its_pairs_out_of_balance() -> None:
    problem, factors = draw()
    flow = flow_chain(problem, factors, [1.0], trained=[True, False, True])
    np.testing.assert_array_equal(flow.factors[1][0], factors[1])
    assert drift([factor[0] for factor in flow.factors], factors) > 1e-2


def test_a_zero_target_from_a_zero_delta_does_not_move() -> None:
    problem = MapSetting(dim=4, target_rank=0).draw([0])
    factors = [np.ones((4, 2)), np.eye(2), np.zeros((2, 4))]
    flow = flow_chain(problem, factors, [0.0, 10.0])
    assert not flow.loss.any()
    for factor, start in zip(flow.factors, factors, strict=True):
        np.testing.assert_array_equal(factor, [start, start])
    still = flow_chain(problem, factors, [0.0])
    np.testing.assert_array_equal(still.factors[0], [factors[0]])
    zeros = flow_chain(problem, [np.zeros((4, 2)), np.zeros((2, 4))], [1.0])
    assert not any(factor.any() for factor in zeros.factors)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("times", {"times": [1.0, 0.5]}),
        ("times", {"times": [0.5, 0.5]}),
        ("times", {"times": [-1.0]}),
        ("times", {"times": []}),
        ("times", {"times": [math.nan]}),
        ("factors", {"factors": [np.ones((4, 4))]}),
        ("factors", {"factors": [np.ones((4, 2)), np.ones((3, 4))]}),
        ("factors", {"factors": [np.ones((4, 2)), np.ones((2, 5))]}),
        ("factors", {"factors": [np.full((4, 2), np.inf), np.ones((2, 4))]}),
        ("map", {"map": 1}),
        ("trained", {"trained": [True]}),
        ("scale", {"scale": math.inf}),
        ("rtol", {"rtol": 0.0}),
        ("atol", {"atol": -1.0}),
        ("times", {"factors": [np.full((4, 2), 1e150), np.full((2, 4), 1e150)]}),
    ],
)
def test_what_is_refused(place: str, options: dict[str, Any]) -> None:
    problem = MapSetting(dim=4).draw([0])
    good = {"factors": [np.ones((4, 2)), np.ones((2, 4))], "times": [1.0]}
    with pytest.raises(InputError) as caught:
        flow_chain(problem, **{**good, **options})
    assert caught.value.place == place


def test_fresh_inputs_have_no_flow() -> None:
    problem = MapSetting(dim=4, batch_size=3).draw([0])
    with pytest.raises(InputError, match="batch_size 3"):
        flow_chain(problem, [np.ones((4, 2)), np.ones((2, 4))], [1.0])


def test_a_flow_that_takes_too_many_gradients_is_given_up() -> None:
    problem, factors = draw()
    with pytest.raises(InputError, match="more than 50 gradients were needed"):
        flow_chain(problem, [1e3 * factors[0], *factors[1:]], [1.0], most_slopes=50)
    with pytest.raises(InputError, match="times: expected times as real numbers, got 'ab'"):
        flow_chain(problem, factors, "ab")  # type: ignore[arg-type]
