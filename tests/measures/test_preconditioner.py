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
    factor_gradients,
    preconditioned,
    random_chain,
    sides,
    small_cores,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_analysis.measures.orders import order_terms
from linchain_analysis.measures.preconditioner import (
    measure_preconditioned_step,
    measure_preconditioner,
    preconditioner_spectrum,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def dense_operator(factors: list[Array]) -> Array:
    """P as a matrix (d_in d_out)² on row-major vec(G)."""
    return sum(np.kron(left @ left.T, right.T @ right) for left, right in sides(factors))


def descend(chain: FullChain, learning_rate: float, gradient: Array) -> FullChain:
    """One step of gradient descent for a loss whose gradient with respect to the full weight is G."""
    gradients = factor_gradients(chain.before, gradient, chain.scale)
    return replace(chain, gradient=gradients, change=[-learning_rate * g for g in gradients])


# --- the step beside P(G) -------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("scale", [2.0, 0.3, -2.0])
def test_gradient_descent_follows_the_preconditioned_gradient(shape: Shape, scale: float) -> None:
    """To first order −lr · scale² · P(G), exactly, and as a whole up to lr; also for scale < 0."""
    rng = np.random.default_rng(0)
    learning_rate = 1e-7
    chain = random_chain(rng, shape, scale=scale)
    gradient = rng.standard_normal(chain.size)
    cores, (basis,) = small_cores([descend(chain, learning_rate, gradient)])
    first = basis.lift(order_terms(cores)[0][0])
    expected = -learning_rate * scale**2 * preconditioned(chain.before, gradient)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-12 * np.linalg.norm(expected))
    values = measure_preconditioned_step(cores)
    # 1 − cos is half the square of the angle, which is of size lr: below rounding.
    np.testing.assert_allclose(values["preconditioned_cosine"], [1], rtol=0, atol=1e-11)
    np.testing.assert_allclose(values["preconditioned_share"], [1], rtol=0, atol=1e-11)


@every_shape
def test_any_step_against_the_dense_operator(shape: Shape) -> None:
    rng = np.random.default_rng(1)
    chains, gradients = [], []
    for scale in (2.0, 0.5, -1.0):
        chain = random_chain(rng, shape, scale=scale, step=0.3)
        gradients.append(rng.standard_normal(chain.size))
        chains.append(replace(chain, gradient=factor_gradients(chain.before, gradients[-1], scale)))
    values = measure_preconditioned_step(small_cores(chains)[0])
    for j, (chain, gradient) in enumerate(zip(chains, gradients, strict=True)):
        direction = (dense_operator(chain.before) @ gradient.ravel()).reshape(chain.size)
        np.testing.assert_allclose(direction, preconditioned(chain.before, gradient), rtol=0, atol=1e-11)
        cosine = -(direction * chain.update).sum() / np.linalg.norm(direction) / np.linalg.norm(chain.update)
        assert values["preconditioned_cosine"][j] == pytest.approx(cosine, rel=1e-10)
        assert values["preconditioned_share"][j] == pytest.approx(cosine**2, rel=1e-10)


def test_the_loss_falls_by_the_square_of_the_factors_gradients() -> None:
    """⟨G, scale² P(G)⟩ = Σ‖g_i‖²."""
    rng = np.random.default_rng(2)
    chain = random_chain(rng, SHAPES["n=3"])
    gradient = rng.standard_normal(chain.size)
    factors = factor_gradients(chain.before, gradient, chain.scale)
    fall = chain.scale**2 * (gradient * preconditioned(chain.before, gradient)).sum()
    assert fall == pytest.approx(sum((g**2).sum() for g in factors), rel=1e-12)


def test_factors_that_do_not_train_have_no_part_in_the_step() -> None:
    """Their gradient is NaN as a whole: descent of the others still has a share of 1; without any there is none."""
    rng = np.random.default_rng(3)
    chain = descend(random_chain(rng, SHAPES["n=2"]), 1e-7, rng.standard_normal((11, 8)))
    chain.change[1][:] = 0
    cores, _ = small_cores([chain])
    assert cores.gradient is not None
    frozen = [np.full_like(g, np.nan) if i == 1 else g for i, g in enumerate(cores.gradient)]
    values = measure_preconditioned_step(replace(cores, gradient=tuple(frozen)))
    np.testing.assert_allclose(values["preconditioned_share"], [1], rtol=0, atol=1e-11)
    none = measure_preconditioned_step(replace(cores, gradient=tuple(np.full_like(g, np.nan) for g in cores.gradient)))
    assert np.isnan([*none.values()]).all()
    broken = [g.copy() for g in cores.gradient]
    broken[0][0, 0, 0] = np.nan  # one entry: a gradient that is not known, and not one that is not there
    assert np.isnan([*measure_preconditioned_step(replace(cores, gradient=tuple(broken))).values()]).all()


# --- the spectrum of P ----------------------------------------------------------------------------------------------


def expected_rank(factors: list[Array]) -> int:
    """r (d_in + d_out − r) with r the narrowest width, the sizes included."""
    d_in, d_out = len(factors[0]), factors[-1].shape[1]
    r = min([d_in, *(factor.shape[1] for factor in factors)])
    return r * (d_in + d_out - r)


def compare_with_dense(chain: FullChain, rank: int) -> None:
    cores, _ = small_cores([chain])
    factors = chain.after
    dense = np.linalg.eigvalsh(dense_operator(factors))
    top = dense[-1]
    for given_factors in (factors, [factor[0] for factor in cores.after]):  # in full and in small coordinates
        values, counts = preconditioner_spectrum(given_factors, chain.size)
        assert (counts >= 0).all()
        found = np.repeat(values, counts.astype(int))
        found = np.concatenate([found, np.zeros(len(dense) - len(found))])
        np.testing.assert_allclose(np.sort(found), dense, rtol=0, atol=1e-12 * top)
    summary = {name: value[0] for name, value in measure_preconditioner(cores).items()}
    kept = dense[-rank:]
    share = kept / kept.sum()
    assert summary["preconditioner_rank"] == rank
    assert summary["preconditioner_largest"] == pytest.approx(top, rel=1e-12)
    # Eigenvalues are exact to rounding of the largest, so the smallest to that times the condition number.
    rounding = max(1e-10, 1e-14 * top / kept[0])
    assert summary["preconditioner_condition"] == pytest.approx(top / kept[0], rel=rounding)
    entropy = -(share * np.log(share)).sum()
    assert summary["preconditioner_effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-10)


@every_shape
def test_the_spectrum_is_that_of_the_dense_operator(shape: Shape) -> None:
    chain = random_chain(np.random.default_rng(4), shape)
    compare_with_dense(chain, expected_rank(chain.before))


@every_shape
@pytest.mark.parametrize("which", ["B", "A"])
def test_with_an_outer_factor_at_zero_only_that_factor_can_move_delta(shape: Shape, which: str) -> None:
    """B = 0: L_{m-1}L_{m-1}ᵀ ⊗ I, so rank r · d_out; with A = 0 likewise r · d_in."""
    chain = random_chain(np.random.default_rng(5), shape)
    end = -1 if which == "B" else 0
    chain.before[end][:] = 0
    chain.change[end][:] = 0
    r = min([chain.size[0 if which == "B" else 1], *shape[1]])
    compare_with_dense(chain, r * chain.size[1 if which == "B" else 0])


def test_rank_deficient_factors() -> None:
    """An inner factor at zero lets only itself move delta; two at zero let nothing; a deficient A counts its rank."""
    rng = np.random.default_rng(6)
    chain = random_chain(rng, SHAPES["n=2"])
    chain.before[1][:], chain.change[1][:] = 0, 0
    compare_with_dense(chain, 3 * 3)
    chain.before[2][:], chain.change[2][:] = 0, 0
    values = measure_preconditioner(small_cores([chain])[0])
    np.testing.assert_array_equal([*values.values()], [[0], [np.nan], [0], [np.nan]])

    chain = random_chain(rng, (9, (4,), 7), step=0)
    chain.before[0][:, 3] = chain.before[0][:, 2]
    # rank A = 3 and rank B = 4: on 3 · 4 both terms, beside it 4 (d_in − 3) and 3 (d_out − 4)
    compare_with_dense(chain, 12 + 4 * (9 - 3) + 3 * (7 - 4))


def test_a_spectrum_computed_by_hand() -> None:
    """A = diag(1, 2) over a zero row, B = diag(3, 1): 9, 1 outside A once, A² + B² on both: 10, 2, 13, 5."""
    a = np.array([[1.0, 0], [0, 2], [0, 0]])
    values, counts = preconditioner_spectrum([a, np.diag([3.0, 1.0])], (3, 2))
    found = np.sort(np.repeat(values, counts.astype(int)))
    np.testing.assert_allclose(found, [1, 2, 5, 9, 10, 13], rtol=1e-14)


def test_only_chains_with_inner_factors_need_the_large_block() -> None:
    rng = np.random.default_rng(7)
    wide = [rng.standard_normal((60, 40)), rng.standard_normal((40, 50))]
    values, counts = preconditioner_spectrum(wide, (60, 50))
    assert counts[values > 1e-9].sum() == 40 * (60 + 50 - 40)
    # Σ of all eigenvalues = trace of P = ‖B‖² d_in + ‖A‖² d_out
    trace = 60 * (wide[1] ** 2).sum() + 50 * (wide[0] ** 2).sum()
    assert (values * counts).sum() == pytest.approx(trace, rel=1e-12)
    deeper = [wide[0], np.eye(40), wide[1]]
    assert np.isnan(preconditioner_spectrum(deeper, (60, 50))[0]).all()
    chain = FullChain(deeper, deeper, deeper)
    assert np.isnan([*measure_preconditioner(small_cores([chain])[0]).values()]).all()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_trace_and_range_of_the_spectrum(seed: int, widths: list[int], d_in: int, d_out: int) -> None:
    chain = random_chain(np.random.default_rng(seed), (d_in, tuple(widths), d_out))
    values, counts = preconditioner_spectrum(chain.after, chain.size)
    trace = sum((left**2).sum() * (right**2).sum() for left, right in sides(chain.after))
    assert (values * counts).sum() == pytest.approx(trace, rel=1e-11)
    assert (values >= -1e-12 * values.max()).all()
    summary = {name: value[0] for name, value in measure_preconditioner(small_cores([chain])[0]).items()}
    assert 1 <= summary["preconditioner_rank"] <= expected_rank(chain.after)
    assert 1 - 1e-12 <= summary["preconditioner_effective_rank"] <= summary["preconditioner_rank"] * (1 + 1e-12)
    assert 1 <= summary["preconditioner_condition"] < 1e12


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [
        ((1e150, 1e-150, 1.0), 4 * 4),  # the term of W1 alone, whose neighbours are the large ones
        ((1e-150, 1.0, 1e-150), 4 * (9 + 12 - 4)),  # those of A and B, which span the rest
        ((1e150, 1e150, 1e150), 4 * (9 + 12 - 4)),
        ((1e-300, 1e-300, 1e-300), 4 * (9 + 12 - 4)),
    ],
)
def test_sizes_far_apart_do_not_change_what_counts(sizes: tuple[float, ...], rank: int) -> None:
    chain = random_chain(np.random.default_rng(9), SHAPES["n=1"], step=0)
    scaled = replace(chain, before=[size * factor for size, factor in zip(sizes, chain.before, strict=True)])
    values = {name: value[0] for name, value in measure_preconditioner(small_cores([scaled])[0]).items()}
    assert values["preconditioner_rank"] == rank
    assert 1 <= values["preconditioner_effective_rank"] <= rank
    if len(set(sizes)) == 1:
        expected = measure_preconditioner(small_cores([chain])[0])
        for name in ("preconditioner_condition", "preconditioner_effective_rank"):
            assert values[name] == pytest.approx(expected[name][0], rel=1e-10)
