from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain_cores import (
    SHAPES,
    Array,
    FullChain,
    Shape,
    every_shape,
    preconditioned,
    product,
    random_chain,
    sides,
    small_cores,
    tangent_projection,
    token_parts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.capture import measure_gradient_capture
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.data_weighted import measure_data_weighted

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

TOKENS = 30


def with_tokens(shape: Shape, seed: int = 0, count: int = 2) -> tuple[list[FullChain], list[Array], list[Array], Cores]:
    rng = np.random.default_rng(seed)
    chains = [random_chain(rng, shape) for _ in range(count)]
    x = [rng.standard_normal((TOKENS, shape[0])) for _ in chains]
    d = [rng.standard_normal((TOKENS, shape[2])) for _ in chains]
    return chains, x, d, small_cores(chains, tokens=token_parts(chains, x, d))[0]


def by_bases(factors: list[Array], gradient: Array) -> Array:
    """UUᵀG + GVVᵀ − UUᵀGVVᵀ."""
    whole_left, whole_right = sides(factors)[-1][0], sides(factors)[0][1]
    rank_left, rank_right = np.linalg.matrix_rank(whole_left), np.linalg.matrix_rank(whole_right)
    u = np.linalg.svd(whole_left)[0][:, :rank_left]
    v = np.linalg.svd(whole_right)[2][:rank_right].T
    in_columns = u @ u.T @ gradient
    return in_columns + gradient @ v @ v.T - in_columns @ v @ v.T


@every_shape
def test_the_projection_on_two_bases_is_that_on_all_moves(shape: Shape) -> None:
    """What the formula of the docstring says, for full rank, for B = 0 and for a deficient A."""
    rng = np.random.default_rng(0)
    factors = random_chain(rng, shape).before
    gradient = rng.standard_normal((shape[0], shape[2]))
    zero_b = [*factors[:-1], np.zeros_like(factors[-1])]
    thin_a = [np.outer(factors[0][:, 0], factors[0][0]), *factors[1:]]
    for each in (factors, zero_b, thin_a):
        np.testing.assert_allclose(by_bases(each, gradient), tangent_projection(each, gradient), rtol=0, atol=1e-11)


def test_with_a_deficient_inner_factor_the_formula_is_a_lower_bound() -> None:
    rng = np.random.default_rng(1)
    factors = random_chain(rng, SHAPES["n=2"]).before
    factors[1][:] = np.outer(factors[1][:, 0], factors[1][0])
    gradient = rng.standard_normal((11, 8))
    lower, whole = (np.linalg.norm(part(factors, gradient)) for part in (by_bases, tangent_projection))
    assert lower < 0.99 * whole < np.linalg.norm(gradient)


@every_shape
def test_every_column_against_the_full_gradient(shape: Shape) -> None:
    chains, x, d, cores = with_tokens(shape)
    values = measure_gradient_capture(cores)
    for j, chain in enumerate(chains):
        gradient = x[j].T @ d[j]
        size = np.linalg.norm(gradient)
        captured = np.linalg.norm(by_bases(chain.before, gradient)) / size
        step = preconditioned(chain.before, gradient)
        cosine = (gradient * step).sum() / size / np.linalg.norm(step)
        assert values["full_grad_norm"][j] == pytest.approx(size, rel=1e-12)
        assert values["gradient_capture"][j] == pytest.approx(captured, rel=1e-10)
        assert values["gradient_preconditioned_cosine"][j] == pytest.approx(cosine, rel=1e-10)
        # P(G) lies in the tangent space, so its angle with G is at least that of the space.
        assert 0 < values["gradient_preconditioned_cosine"][j] <= values["gradient_capture"][j] * (1 + 1e-12)
        assert values["gradient_capture"][j] <= 1 + 1e-12


def test_a_chain_as_wide_as_the_weight_captures_everything() -> None:
    *_, cores = with_tokens((3, (5, 5), 7))
    np.testing.assert_allclose(measure_gradient_capture(cores)["gradient_capture"], 1, rtol=1e-12)


def test_a_capture_computed_by_hand() -> None:
    """A = e₁ and B = e₁ᵀ move the first row and column: of G all ones 3 of 4; P(G) = (2, 1; 1, 0)."""
    chain = FullChain([np.eye(2, 1), np.eye(1, 2)], [np.zeros((2, 1)), np.zeros((1, 2))], [np.eye(2, 1), np.eye(1, 2)])
    parts = token_parts([chain], [np.ones((1, 2))], [np.ones((1, 2))])
    values = measure_gradient_capture(small_cores([chain], tokens=parts)[0])
    assert values["full_grad_norm"] == pytest.approx(2, rel=1e-14)
    assert values["gradient_capture"] == pytest.approx(np.sqrt(3) / 2, rel=1e-14)
    assert values["gradient_preconditioned_cosine"] == pytest.approx(4 / 2 / np.sqrt(6), rel=1e-14)


def test_tokens_without_a_gradient_or_not_seen() -> None:
    *_, cores = with_tokens(SHAPES["n=1"], count=3)
    assert cores.tokens is not None
    gradient_square = cores.tokens.gradient_square * [1, 0, np.nan]
    tangent_square = cores.tokens.tangent_square * [1, 0, np.nan]
    tokens = replace(cores.tokens, gradient_square=gradient_square, tangent_square=tangent_square)
    values = measure_gradient_capture(replace(cores, tokens=tokens))
    np.testing.assert_array_equal(values["full_grad_norm"][1:], [0, np.nan])
    for name in ("gradient_capture", "gradient_preconditioned_cosine"):
        np.testing.assert_array_equal(np.isnan(values[name]), [False, True, True])
    for value in measure_gradient_capture(replace(cores, tokens=None)).values():
        assert np.isnan(value).all()


@every_shape
def test_what_delta_does_to_inputs_against_the_full_product(shape: Shape) -> None:
    chains, x, _, cores = with_tokens(shape, seed=3)
    values = measure_data_weighted(cores)
    length = min(shape[0], *shape[1], shape[2])
    assert values["data_weighted_spectrum"].shape == (2, length)
    for j, chain in enumerate(chains):
        seen = x[j] @ (chain.scale * product(chain.before)) / np.sqrt(TOKENS)
        sigma = np.linalg.svd(seen, compute_uv=False)[:length]
        np.testing.assert_allclose(values["data_weighted_spectrum"][j], sigma, rtol=0, atol=1e-12 * sigma[0])
        share = sigma / sigma.sum()
        rank = np.exp(-(share * np.log(share)).sum())
        assert values["data_weighted_effective_rank"][j] == pytest.approx(rank, rel=1e-10)


def test_whitened_inputs_see_delta_as_it_is() -> None:
    rng = np.random.default_rng(4)
    chain = random_chain(rng, SHAPES["n=2"], step=0)
    x = np.sqrt(TOKENS) * np.linalg.qr(rng.standard_normal((TOKENS, 11)))[0]
    parts = token_parts([chain], [x], [rng.standard_normal((TOKENS, 8))])
    values = measure_data_weighted(small_cores([chain], tokens=parts)[0])
    sigma = np.linalg.svd(chain.delta, compute_uv=False)[:3]
    np.testing.assert_allclose(values["data_weighted_spectrum"][0], sigma, rtol=1e-10)


def test_inputs_that_delta_does_not_touch_or_that_nobody_saw() -> None:
    *_, cores = with_tokens(SHAPES["n=1"], count=3)
    assert cores.tokens is not None
    inputs = cores.tokens.inputs.copy()
    inputs[1], inputs[2] = 0, np.nan
    values = measure_data_weighted(replace(cores, tokens=replace(cores.tokens, inputs=inputs)))
    np.testing.assert_array_equal(values["data_weighted_spectrum"][1:], [[0] * 4, [np.nan] * 4])
    np.testing.assert_array_equal(np.isnan(values["data_weighted_effective_rank"]), [False, True, True])
    empty = replace(cores, tokens=replace(cores.tokens, num_tokens=np.zeros(3)))
    assert np.isnan(measure_data_weighted(empty)["data_weighted_spectrum"]).all()
    moved = replace(cores, start=cores.before, since_start=cores.change)
    for value in measure_data_weighted(moved).values():
        assert np.isnan(value).all()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 5)
)
def test_ranges(seed: int, widths: list[int], d_in: int, d_out: int) -> None:
    *_, cores = with_tokens((d_in, tuple(widths), d_out), seed=seed, count=1)
    values = measure_gradient_capture(cores)
    assert 0 < values["gradient_preconditioned_cosine"][0] <= values["gradient_capture"][0] * (1 + 1e-10) <= 1 + 1e-9
    seen = measure_data_weighted(cores)
    rank, sigma = seen["data_weighted_effective_rank"][0], seen["data_weighted_spectrum"][0]
    assert 1 - 1e-12 <= rank <= len(sigma) * (1 + 1e-12)
