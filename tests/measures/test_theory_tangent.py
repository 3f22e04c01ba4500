"""Jacobian, its rank, and the effective preconditioner, against dense twins and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chain_cores import SHAPES, Shape, change_gauge, every_shape, preconditioned, product, random_chain, sides
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.theory.gradients import factor_gradients
from linchain_analysis.measures.theory.tangent import (
    count_parameters,
    draw_generic_factors,
    first_step_rank,
    gauge_dimension,
    jacobian,
    measure_tangent_rank,
    preconditioned_gradient,
    tangent_rank,
)


def dims_of(shape: Shape) -> tuple[int, ...]:
    return (shape[0], *shape[1], shape[2])


@every_shape
def test_the_preconditioner_is_its_dense_twin(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    factors = random_chain(rng, shape).before
    gradient = rng.standard_normal((shape[0], shape[2]))
    found = preconditioned_gradient(factors, gradient)
    np.testing.assert_allclose(found, preconditioned(factors, gradient), rtol=0, atol=1e-12 * np.linalg.norm(found))
    # J Jᵀ is the same map, on G row by row.
    j = jacobian(factors)
    np.testing.assert_allclose(j @ (j.T @ gradient.ravel()), found.ravel(), rtol=0, atol=1e-12 * np.linalg.norm(found))
    # −dL/dt of gradient flow is Σ‖g_i‖² and ⟨G, P(G)⟩.
    squares = sum((g**2).sum() for g in factor_gradients(factors, gradient))
    assert (gradient * found).sum() == pytest.approx(squares, rel=1e-12)
    # Only some factors train.
    trained = [i % 2 == 0 for i in range(len(factors))]
    terms = [a @ a.T @ gradient @ b.T @ b for (a, b), train in zip(sides(factors), trained, strict=True) if train]
    part = preconditioned_gradient(factors, gradient, trained)
    np.testing.assert_allclose(part, sum(terms), rtol=0, atol=1e-12 * np.linalg.norm(found))
    assert not preconditioned_gradient(factors, gradient, [False] * len(factors)).any()


@every_shape
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_step_of_gradient_descent_is_the_preconditioned_gradient(shape: Shape, scale: float) -> None:
    """The coefficient of lr in scale · ∏(F_i − lr g_i), by fitting the polynomial exactly, is −scale² P(G)."""
    rng = np.random.default_rng(1)
    factors = random_chain(rng, shape).before
    gradient = rng.standard_normal((shape[0], shape[2]))
    gradients = factor_gradients(factors, gradient, scale)
    size = max(np.linalg.norm(g) for g in gradients)
    points = np.cos(np.pi * (np.arange(len(factors) + 1) + 0.5) / (len(factors) + 1)) / size  # Chebyshev's
    values = np.stack(
        [scale * product([f - lr * g for f, g in zip(factors, gradients, strict=True)]).ravel() for lr in points]
    )
    coefficients = np.linalg.solve(np.vander(points * size, increasing=True), values)
    first = coefficients[1] * size
    expected = -(scale**2) * preconditioned_gradient(factors, gradient).ravel()
    # The fit mixes orders, of which the largest sets the rounding.
    rounding = 1e-12 * np.linalg.norm(coefficients, axis=1).max() * size
    np.testing.assert_allclose(first, expected, rtol=0, atol=rounding)


def test_a_stack_of_chains() -> None:
    rng = np.random.default_rng(2)
    shape = SHAPES["8-16-8"]
    chains = [random_chain(rng, shape).before for _ in range(3)]
    gradient = rng.standard_normal((3, shape[0], shape[2]))
    stack = [np.stack(factors) for factors in zip(*chains, strict=True)]
    together = preconditioned_gradient(stack, gradient)
    for found, factors, own in zip(together, chains, gradient, strict=True):
        np.testing.assert_allclose(found, preconditioned_gradient(factors, own), rtol=0, atol=1e-11)


@every_shape
def test_the_jacobian_is_autograds(shape: Shape) -> None:
    factors = [torch.tensor(f) for f in random_chain(np.random.default_rng(3), shape).before]
    blocks = torch.autograd.functional.jacobian(lambda *leaves: torch.linalg.multi_dot(leaves), tuple(factors))
    expected = np.hstack([block.reshape(shape[0] * shape[2], -1).numpy() for block in blocks])
    found = jacobian([f.numpy() for f in factors])
    assert found.shape == (shape[0] * shape[2], count_parameters(dims_of(shape)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("num_inner", [0, 1, 2, 3, 4])
def test_depth_adds_no_direction(num_inner: int) -> None:
    """r (d_in + d_out − r) directions and r · d_out at B = 0 for every n; n r² more parameters, all of them gauge."""
    d_in, d_out, r = 9, 7, 3
    dims = (d_in, *[r] * (num_inner + 1), d_out)
    factors = draw_generic_factors(dims, np.random.default_rng(num_inner))
    assert tangent_rank(dims) == measure_tangent_rank(factors) == r * (d_in + d_out - r)
    assert gauge_dimension(dims) == (num_inner + 1) * r * r
    assert count_parameters(dims) == (d_in + d_out) * r + num_inner * r * r
    factors[-1][:] = 0
    assert first_step_rank(dims) == measure_tangent_rank(factors) == r * d_out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_ranks_by_formula_and_by_number(seed: int, d_in: int, widths: list[int], d_out: int) -> None:
    """Any widths: bottlenecks, and more width than d_in or d_out."""
    dims = (d_in, *widths, d_out)
    rng = np.random.default_rng(seed)
    # Orthonormal rows or columns are of full rank without the chance of a condition number beyond float64.
    factors = [np.linalg.svd(f, full_matrices=False) for f in draw_generic_factors(dims, rng)]
    factors = [u @ np.diag(rng.uniform(0.5, 1, len(s))) @ vt for u, s, vt in factors]
    assert measure_tangent_rank(factors) == tangent_rank(dims)
    factors[-1][:] = 0
    assert measure_tangent_rank(factors) == first_step_rank(dims)
    assert 0 <= gauge_dimension(dims) < count_parameters(dims)


def test_ranks_by_hand() -> None:
    # 2 × 2 of rank 1: three directions, a cone of dimension 3.
    assert tangent_rank((2, 1, 2)) == 3
    # r above both: every direction of the 3 × 4 matrices, and no more.
    assert tangent_rank((3, 5, 5, 4)) == 12
    assert first_step_rank((3, 5, 5, 4)) == 12
    # A bottleneck of 2 in a chain of width 4.
    assert tangent_rank((10, 4, 2, 4, 9)) == 2 * (10 + 9 - 2)
    # 8-16-8: Σ w_i² = 384 changes of gauge, of which (16 − 8)² = 64 move neither W1 nor W2.
    assert gauge_dimension((12, 8, 16, 8, 11)) == 8 * 12 + 128 + 128 + 8 * 11 - 8 * 15 == 320


def test_a_singular_factor_loses_directions() -> None:
    dims = (6, 3, 3, 5)
    factors = draw_generic_factors(dims, np.random.default_rng(4))
    factors[1][:, 0] = 0
    # L_2 = A W1 has rank 2, R_0 = W1 B has rank 2: only W1 itself can bring the third direction back.
    assert measure_tangent_rank(factors) < tangent_rank(dims)
    assert measure_tangent_rank([np.zeros_like(f) for f in factors]) == 0


def test_the_tangent_space_does_not_depend_on_the_gauge() -> None:
    rng = np.random.default_rng(5)
    shape = SHAPES["n=2"]
    chain = random_chain(rng, shape)
    gauges = [np.eye(3) + 0.3 * rng.standard_normal((3, 3)) for _ in range(3)]
    turned = change_gauge(chain, gauges)
    both = np.hstack([jacobian(chain.before), jacobian(turned.before)])
    rank = tangent_rank(dims_of(shape))
    assert measure_tangent_rank(turned.before) == rank == int(np.linalg.matrix_rank(both, tol=1e-9))
    # P does: depth and gauge weigh the same directions differently.
    gradient = rng.standard_normal((shape[0], shape[2]))
    one, other = (preconditioned_gradient(c.before, gradient) for c in (chain, turned))
    assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(one)
