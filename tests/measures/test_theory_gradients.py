"""Closed-form gradients against autograd, and where the paper's printed ones are right."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.gradients import (
    factor_gradients,
    first_gradient,
    inner_gradient,
    last_gradient,
    multiply_chain,
    printed_errors,
    printed_inner_gradient,
)

Array = NDArray[np.float64]

# w_0 … w_n for n = 0 … 4, the paper's 8-16-8, widths that all differ, a bottleneck, more width than d_in or d_out.
WIDTHS = [(4,), (4, 4), (3, 3, 3), (8, 16, 8), (3, 5, 6, 4), (4, 2, 4), (3,) * 4, (2,) * 5, (12,), (12, 13, 12)]
every_width = pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: "-".join(map(str, widths)))
D_IN, D_OUT = 9, 7


def draw(widths: tuple[int, ...], seed: int = 0, stack: tuple[int, ...] = ()) -> list[Array]:
    rng = np.random.default_rng([seed, *widths])
    sizes = itertools.pairwise((D_IN, *widths, D_OUT))
    return [rng.standard_normal((*stack, *size)) / np.sqrt(size[0]) for size in sizes]


def draw_gradient(seed: int = 0, stack: tuple[int, ...] = ()) -> Array:
    return np.random.default_rng([seed, 99]).standard_normal((*stack, D_IN, D_OUT))


def relative(found: Array, right: Array) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def autograd(factors: list[Array], scale: float) -> tuple[list[Array], Array, Array, Array]:
    """Gradients of a nonlinear loss of y = x (W_0 + scale · A W1 … Wn B), and G, x, Δ of the same loss."""
    rng = np.random.default_rng(5)
    x, w0 = (torch.tensor(rng.standard_normal(shape)) for shape in ((6, D_IN), (D_IN, D_OUT)))
    labels = torch.tensor(rng.integers(0, D_OUT, 6))
    leaves = [torch.tensor(factor, requires_grad=True) for factor in factors]
    product = leaves[0]
    for leaf in leaves[1:]:
        product = product @ leaf
    delta = scale * product
    delta.retain_grad()
    y = x @ (w0 + delta)
    y.retain_grad()
    (torch.nn.functional.cross_entropy(y, labels) + torch.log(torch.cosh(y)).sum()).backward()
    return [leaf.grad.numpy() for leaf in leaves], delta.grad.numpy(), x.numpy(), y.grad.numpy()


@every_width
@pytest.mark.parametrize("scale", [1.0, 2.0, -0.3])
def test_every_gradient_is_autograds(widths: tuple[int, ...], scale: float) -> None:
    factors = draw(widths)
    right, gradient, x, output_gradient = autograd(factors, scale)
    assert relative(x.T @ output_gradient, gradient) < 1e-14  # G = xᵀΔ, summed over the rows of x
    last = len(factors) - 1
    closed = [
        first_gradient(factors, gradient, scale),
        *(inner_gradient(factors, i, gradient, scale) for i in range(1, last)),
        last_gradient(factors, gradient, scale),
    ]
    for one, together, expected in zip(closed, factor_gradients(factors, gradient, scale), right, strict=True):
        assert one.shape == expected.shape
        assert relative(one, expected) < 1e-12
        assert relative(together, expected) < 1e-12


@every_width
def test_a_stack_is_its_chains_one_by_one(widths: tuple[int, ...]) -> None:
    stack, scale = draw(widths, stack=(2, 3)), np.array([[1.0, 2.0, -1.0], [0.5, 0.1, 3.0]])
    gradient = draw_gradient(stack=(2, 3))
    together = factor_gradients(stack, gradient, scale)
    errors = printed_errors(stack, gradient)
    assert errors.shape == (2, 3, len(widths) - 1)
    for place in np.ndindex(2, 3):
        chain = [factor[place] for factor in stack]
        alone = factor_gradients(chain, gradient[place], float(scale[place]))
        for i, expected in enumerate(alone):
            np.testing.assert_allclose(together[i][place], expected, rtol=1e-12, atol=1e-14)
            if 0 < i < len(alone) - 1:
                inner = inner_gradient(stack, i, gradient, scale)[place]
                np.testing.assert_allclose(inner, expected, rtol=1e-12, atol=1e-13)
        # Errors around 1e-16 are rounding, which need not be the same.
        np.testing.assert_allclose(errors[place], printed_errors(chain, gradient[place]), rtol=1e-10, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_gradients_are_the_change_of_the_loss(seed: int, widths: list[int]) -> None:
    """⟨G, d(ΔW)⟩ = Σ ⟨∂L/∂F_i, dF_i⟩ to first order, for any direction: no formula of theirs is used."""
    factors, moves = draw(tuple(widths), seed), draw(tuple(widths), seed + 1)
    gradient = draw_gradient(seed)
    along = sum((g * d).sum() for g, d in zip(factor_gradients(factors, gradient, 2.0), moves, strict=True))
    step = 1e-6
    ends = [
        2.0 * (gradient * multiply_chain([f + sign * step * d for f, d in zip(factors, moves, strict=True)])).sum()
        for sign in (1, -1)
    ]
    size = sum(np.linalg.norm(g) for g in factor_gradients(factors, gradient, 2.0)) + np.abs(ends).max()
    # A central difference with step h is good to h² and to rounding / h.
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, abs=1e-8 * size)


def test_two_inner_factors_by_hand() -> None:
    """A = B = I, W1 = [[0, 1], [0, 0]]: ∂L/∂W2 = W1ᵀ G has the first row of G in its second; printed is G W1ᵀ."""
    eye, nilpotent = np.eye(2), np.array([[0.0, 1.0], [0.0, 0.0]])
    gradient = np.array([[1.0, 2.0], [3.0, 4.0]])
    factors = [eye, nilpotent, eye, eye]
    np.testing.assert_array_equal(inner_gradient(factors, 2, gradient), [[0, 0], [1, 2]])
    printed = printed_inner_gradient(factors, 2, gradient)
    assert printed is not None
    np.testing.assert_array_equal(printed, [[2, 0], [4, 0]])
    # ‖[[2, 0], [3, −2]]‖ / ‖[1, 2]‖
    np.testing.assert_allclose(printed_errors(factors, gradient), [0, math.sqrt(17 / 5)], rtol=1e-15)


@pytest.mark.parametrize("num_inner", [1, 2, 3, 4, 5])
def test_where_the_printed_equation_is_right(num_inner: int) -> None:
    """For i = 1 and n ≤ 2, and nowhere else: elsewhere generic square chains are wrong by about their own size."""
    widths = (6,) * (num_inner + 1)
    errors = np.stack([printed_errors(draw(widths, seed), draw_gradient(seed)) for seed in range(20)])
    for i in range(1, num_inner + 1):
        if i == 1 and num_inner <= 2:
            assert errors[:, i - 1].max() < 1e-14
        else:
            assert errors[:, i - 1].min() > 0.3


def test_the_printed_equation_is_right_where_matrices_commute() -> None:
    factors = [draw((4,))[0], *(c * np.eye(4) for c in (2.0, -1.0, 3.0)), draw((4,))[1]]
    np.testing.assert_allclose(printed_errors(factors, draw_gradient()), 0, atol=1e-14)


def test_shapes_that_do_not_multiply() -> None:
    gradient = draw_gradient()
    paper = draw((8, 16, 8))
    assert printed_inner_gradient(paper, 2, gradient) is None
    errors = printed_errors(paper, gradient)
    assert errors[0] < 1e-14
    assert math.isnan(errors[1])
    assert np.isnan(printed_errors(draw((3, 5, 6, 4)), gradient)).all()
    # (2, 3) (3, 2): the product exists, of a shape that W2 does not have.
    printed = printed_inner_gradient(draw((2, 3, 3)), 2, gradient)
    assert printed is not None
    assert printed.shape == (2, 2)
    assert math.isnan(printed_errors(draw((2, 3, 3)), gradient)[1])
    # What is printed is a product of transposes of products, to the letter.
    square = draw((5, 5, 5, 5))
    post, pre = square[3] @ np.eye(5), np.eye(5) @ square[1]
    letter = square[0].T @ gradient @ square[-1].T @ post.T @ pre.T
    np.testing.assert_allclose(printed_inner_gradient(square, 2, gradient), letter, rtol=0, atol=1e-13)
    pre = square[2] @ square[1]  # W_{i-1} … W_1
    letter = square[0].T @ gradient @ square[-1].T @ pre.T
    np.testing.assert_allclose(printed_inner_gradient(square, 3, gradient, 2.0), 2 * letter, rtol=0, atol=1e-13)


def test_a_stack_in_one_factor_alone_is_broadcast() -> None:
    factors, gradient = draw((3, 3, 3, 3)), draw_gradient()
    stack = np.random.default_rng(3).standard_normal((4, 3, 3))
    for i in (1, 2, 3):
        stacked = [*factors[:i], stack, *factors[i + 1 :]]
        together = printed_errors(stacked, gradient)
        assert together.shape == (4, 3)
        for own, errors in zip(stack, together, strict=True):
            alone = printed_errors([*factors[:i], own, *factors[i + 1 :]], gradient)
            # An error around 1e-16 is rounding, which need not be the same.
            np.testing.assert_allclose(errors, alone, rtol=1e-10, atol=1e-14)
    assert printed_errors([np.stack([factors[0]] * 4), factors[-1]], gradient).shape == (4, 0)
    assert np.isnan(printed_errors([draw((8, 16, 8))[0], *draw((8, 16, 8), stack=(2,))[1:]], gradient)[:, 1]).all()


def test_undefined_errors() -> None:
    assert printed_errors(draw((4,)), draw_gradient()).shape == (0,)
    assert np.isnan(printed_errors(draw((4, 4)), np.zeros((D_IN, D_OUT)))).all()


@pytest.mark.parametrize(
    ("widths", "i", "said"), [((4,), 1, "a chain with"), ((4, 4), 0, "1 to 1"), ((4, 4), 2, "got 2")]
)
def test_an_inner_factor_that_there_is_not(widths: tuple[int, ...], i: int, said: str) -> None:
    for gradient_of in (inner_gradient, printed_inner_gradient):
        with pytest.raises(InputError, match=said):
            gradient_of(draw(widths), i, draw_gradient())
