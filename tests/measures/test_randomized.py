from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linchain_analysis.errors import InputError
from linchain_analysis.measures import randomized
from linchain_analysis.measures.intruders import cosine_bound, find_intruders, intruder_dimensions
from linchain_analysis.measures.randomized import (
    keep_accurate,
    randomized_svd,
    triplet_residuals,
    vector_errors,
    weight_operator,
)
from linchain_analysis.measures.subspaces import principal_angles


def weight(seed: int, rows: int, columns: int, power: float = 0.7) -> np.ndarray:
    """Random vectors with singular values i^−power, as those of pretrained weights fall."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((rows, min(rows, columns))))[0]
    v = np.linalg.qr(rng.standard_normal((columns, min(rows, columns))))[0]
    return (u * np.arange(1.0, u.shape[1] + 1) ** -power) @ v.T


def update(seed: int, rows: int, columns: int, rank: int, size: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    return [a * (size / np.linalg.norm(a @ b, 2)), np.eye(rank), b]


def count_intruders(changed: np.ndarray, base: np.ndarray, count: int, epsilon: float, side: int = 0) -> int:
    """The definition, on dense singular value decompositions (side 0: left vectors, 2: right ones)."""
    pair = [np.linalg.svd(matrix, full_matrices=False)[side] for matrix in (changed, base)]
    new, old = (vectors if side == 0 else vectors.T for vectors in pair)
    return int((np.abs(old.T @ new[:, :count]).max(axis=0) < epsilon).sum())


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (12, 12)])
def test_low_rank_matrices_are_found_to_rounding(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((shape[0], 8)) @ rng.standard_normal((8, shape[1]))
    found = randomized_svd(matrix, 8)
    np.testing.assert_allclose(found.sigma, np.linalg.svd(matrix)[1][:8], rtol=1e-12)
    np.testing.assert_allclose(found.left * found.sigma @ found.right.T, matrix, atol=1e-12 * found.sigma[0])
    more = randomized_svd(matrix, 10)
    assert np.isnan(more.left[:, 8:]).all() and np.isnan(more.right[:, 8:]).all()
    assert (more.sigma[8:] <= more.cut_off * more.sigma[0]).all()


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(21, 50), st.integers(21, 50))
def test_triplets_are_exact_for_a_matrix_nearby(seed: int, count: int, rows: int, columns: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    found = randomized_svd(matrix, count, seed=seed, num_power_iterations=0, oversampling=0)
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-12)
    residuals = triplet_residuals(matrix, found)
    error = matrix @ found.right - found.left * found.sigma
    near = matrix - error @ found.right.T
    rounding = 1e-12 * np.linalg.norm(matrix)
    np.testing.assert_allclose(near @ found.right, found.left * found.sigma, atol=rounding)
    np.testing.assert_allclose(near.T @ found.left, found.right * found.sigma, atol=rounding)
    assert np.linalg.norm(near - matrix) <= np.linalg.norm(residuals) + rounding
    # No sample sees more than there is.
    assert (found.sigma <= np.linalg.svd(matrix)[1][:count] + rounding).all()


def test_power_iterations_and_the_errors_that_remain() -> None:
    matrix = weight(1, 300, 200)
    u, sigma, _ = np.linalg.svd(matrix)
    previous = np.inf
    for iterations in (0, 2, 6):
        found = randomized_svd(matrix, 30, num_power_iterations=iterations)
        residuals = triplet_residuals(matrix, found)
        assert np.linalg.norm(residuals) < previous
        previous = np.linalg.norm(residuals)
        errors = vector_errors(found.sigma, residuals)
        sines = np.array([np.sin(principal_angles(found.left[:, [i]], u[:, [i]])[0]) for i in range(30)])
        assert (sines <= errors + 1e-13).all()
    assert np.abs(found.sigma[:20] / sigma[:20] - 1).max() < 1e-6
    assert np.median(errors[:15]) < 1e-4 and errors[-1] == 1
    kept = keep_accurate(found, errors, limit=1e-3)
    np.testing.assert_array_equal(np.isnan(kept.left).any(axis=0), errors > 1e-3)
    # Two values of 2 cannot be told apart; 0.1/(1 − 0.5) for the third.
    np.testing.assert_array_equal(vector_errors([2.0, 2.0, 1.0, 0.5], [0.0, 0.1, 0.1, 0.0]), [0, 1, 0.2, 0])


def test_it_is_seeded_and_leaves_the_global_generator_alone() -> None:
    matrix = weight(2, 50, 40)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = randomized_svd(matrix, 5, seed=3), randomized_svd(matrix, 5, seed=3)
    np.testing.assert_array_equal(one.left, two.left)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_zero_and_broken_matrices_have_defined_results() -> None:
    zero = randomized_svd(np.zeros((20, 15)), 3)
    np.testing.assert_array_equal(zero.sigma, 0)
    assert np.isnan(zero.left).all() and np.isnan(triplet_residuals(np.zeros((20, 15)), zero)).all()
    for bad in (np.nan, np.inf):
        broken = weight(3, 20, 15)
        broken[3, 4] = bad
        with np.errstate(invalid="ignore"):
            found = randomized_svd(broken, 3)
        assert np.isnan(found.sigma).all() and np.isnan(found.left).all() and np.isnan(found.right).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_operators_are_the_dense_sum(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomized, "_BLOCK", 100)  # several blocks, the last one shorter
    rng = np.random.default_rng(4)
    base = rng.standard_normal((37, 25)).astype(dtype)
    factors = [rng.standard_normal(shape) for shape in ((37, 3), (3, 5), (5, 25))]
    dense = base.astype(float) + 0.5 * factors[0] @ factors[1] @ factors[2]
    wide, tall = rng.standard_normal((25, 4)), rng.standard_normal((37, 4))
    for source in (base, aslinearoperator(base.astype(float))):
        operator = weight_operator(source, factors, scale=0.5)
        np.testing.assert_allclose(operator @ wide, dense @ wide, atol=1e-12)
        np.testing.assert_allclose(operator.T @ tall, dense.T @ tall, atol=1e-12)
        np.testing.assert_allclose(operator @ wide[:, 0], dense @ wide[:, 0], atol=1e-12)
        np.testing.assert_allclose(operator.rmatvec(tall[:, 0]), dense.T @ tall[:, 0], atol=1e-12)
    found, twin = randomized_svd(operator, 6), randomized_svd(dense, 6)
    np.testing.assert_allclose(found.sigma, twin.sigma, rtol=1e-12)


def test_the_sum_is_not_formed() -> None:
    """Six passes over W_0 with K + 10 columns each, as the method promises."""
    base = weight(5, 60, 50)
    widths: list[int] = []

    def seen(product: np.ndarray) -> np.ndarray:
        widths.append(product.shape[1])
        return product

    counted = LinearOperator(
        base.shape,
        matvec=lambda x: base @ x,
        rmatvec=lambda x: base.T @ x,
        matmat=lambda x: seen(base @ x),
        rmatmat=lambda x: seen(base.T @ x),
        dtype=float,
    )
    randomized_svd(weight_operator(counted, update(5, 60, 50, 2, 1.0)), 7)
    assert widths == [17] * 6


@given(st.integers(0, 2**32), st.sampled_from([0.2, 0.5, 0.8]), st.floats(0.05, 3), st.integers(1, 30))
def test_both_bounds_hold_and_meet_where_all_is_known(seed: int, epsilon: float, size: float, num: int) -> None:
    base, factors = weight(seed, 30, 30), update(seed, 30, 30, 3, size)
    changed = base + factors[0] @ factors[2]
    u, u0 = np.linalg.svd(changed)[0][:, :8], np.linalg.svd(base)[0]
    truth = count_intruders(changed, base, 8, epsilon)
    full = intruder_dimensions(u, u0, epsilon=epsilon)
    assert full.num_lower == full.num_upper == truth
    known = np.random.default_rng(seed).permutation(30)[:num]  # any K of them
    part = intruder_dimensions(u, u0[:, known], epsilon=epsilon)
    assert part.num_lower <= truth <= part.num_upper
    cosines = np.abs(u0.T @ u).max(axis=0)
    assert (part.cosine_low <= cosines + 1e-12).all() and (cosines <= part.cosine_high + 1e-12).all()
    outside = cosine_bound(base, u, u0[:, known], num_steps=10)
    better = intruder_dimensions(u, u0[:, known], epsilon=epsilon, outside=outside)
    assert part.num_lower <= better.num_lower <= truth <= better.num_upper
    # Neither signs nor order of the known vectors matter.
    turned = intruder_dimensions(-u, -u0[:, known[::-1]], epsilon=epsilon)
    np.testing.assert_allclose(turned.cosine_high, part.cosine_high, atol=1e-12)


def test_an_intruder_by_hand() -> None:
    # W_0 = diag(3, 2, 1); u = (e_1 + e_2)/√2 has cosine 0.707 with both.
    known, u = np.eye(3), np.array([[1.0], [1.0], [0.0]]) / np.sqrt(2)
    assert intruder_dimensions(u, known, epsilon=0.8).num_lower == 1
    assert intruder_dimensions(u, known, epsilon=0.7).num_upper == 0
    # With e_1 alone known the rest is 0.707 long, and may be one vector; with e_1 and e_2 nothing is left.
    one = intruder_dimensions(u, known[:, :1], epsilon=0.75)
    np.testing.assert_allclose([one.cosine_low, one.cosine_high], np.sqrt(0.5))
    third = intruder_dimensions(np.full((3, 1), 3**-0.5), known[:, :1], epsilon=0.7)  # two thirds are unknown
    assert (third.num_lower, third.num_upper) == (0, 1)
    # In fact it is one, and the weights 1/3, 1/3, 1/3 are found in three steps.
    bound = cosine_bound(np.diag([3.0, 2.0, 1.0]), np.full((3, 1), 3**-0.5), known[:, :1], num_steps=3)
    np.testing.assert_allclose(bound, 3**-0.5, rtol=1e-12)
    assert intruder_dimensions(np.full((3, 1), 3**-0.5), known[:, :1], epsilon=0.7, outside=bound).num_lower == 1


def test_vectors_of_a_tall_weight_that_are_all_known() -> None:
    base, factors = weight(6, 40, 12), update(6, 40, 12, 2, 2.0)
    changed = base + factors[0] @ factors[2]
    u, u0 = (np.linalg.svd(matrix, full_matrices=False)[0] for matrix in (changed, base))
    exact = intruder_dimensions(u[:, :6], u0, complete=True)
    assert exact.num_lower == exact.num_upper == count_intruders(changed, base, 6, 0.5) > 0
    # The part of u outside the column space of W_0 matches nothing, but the norm cannot say so.
    assert intruder_dimensions(u[:, :6], u0).num_lower <= exact.num_lower


@given(st.integers(0, 2**32), st.integers(1, 25), st.booleans(), st.booleans())
def test_the_cosine_bound_holds_for_every_vector(seed: int, steps: int, leave_out: bool, tall: bool) -> None:
    rng = np.random.default_rng(seed)
    base = weight(seed, 30 if tall else 20, 20, power=rng.uniform(0, 1.5))
    u0 = np.linalg.svd(base, full_matrices=False)[0]
    u = np.linalg.qr(u0[:, :3] + rng.uniform(0, 2) * rng.standard_normal((len(base), 3)))[0]
    known = u0[:, :4] if leave_out else None
    rest = u - u0[:, :4] @ (u0[:, :4].T @ u) if leave_out else u
    bound = cosine_bound(base, u, known, num_steps=steps)
    # 0.1 %: the maximum is looked for on a grid.
    assert (np.abs(u0.T @ rest).max(axis=0) <= bound * 1.001 + 1e-9).all()
    assert (bound <= np.linalg.norm(rest, axis=0) + 1e-9).all()


@given(st.integers(0, 2**32), st.integers(2, 12))
def test_the_cosine_bound_holds_for_groups_of_equal_singular_values(seed: int, pairs: int) -> None:
    rng = np.random.default_rng(seed)
    u0 = np.linalg.qr(rng.standard_normal((2 * pairs, 2 * pairs)))[0]
    u = u0 @ rng.standard_normal(2 * pairs)[:, None]
    u /= np.linalg.norm(u)
    groups = np.sqrt(((u0.T @ u) ** 2).reshape(pairs, 2).sum(axis=1))
    sigma = np.repeat(1 + np.arange(pairs), 2)
    # Lanczos ends after `pairs` steps, and then the bound is the share of the largest group itself.
    found = cosine_bound(u0 * sigma, u, num_steps=2 * pairs)
    np.testing.assert_allclose(found, groups.max(), rtol=1e-6)  # √ of the rounding at which Lanczos ends


def test_intruders_new_to_a_weight_are_certain_by_their_spread_only() -> None:
    """Of K = 20 of 400 vectors known, the norm certifies none of the 4 intruders; their spread certifies all."""
    base, factors = weight(7, 400, 400), update(7, 400, 400, 4, 3.0)
    changed = base + factors[0] @ factors[2]
    known = randomized_svd(base, 20)
    for side in ("left", "right"):
        truth = count_intruders(changed, base, 8, 0.6, side=0 if side == "left" else 2)
        assert truth == 4
        found = find_intruders(base, factors, known, count=8, epsilon=0.6, side=side)  # type: ignore[arg-type]
        assert found.num_lower == truth == found.num_upper
        plain = find_intruders(base, factors, known, count=8, epsilon=0.6, side=side, num_steps=0)  # type: ignore[arg-type]
        assert plain.num_lower == 0


def test_vectors_that_could_not_be_computed_are_never_certain() -> None:
    """In the bulk of a random matrix single vectors are not found, and errors left out would certify nonsense."""
    rng = np.random.default_rng(8)
    base, factors = rng.standard_normal((300, 300)) / np.sqrt(300), update(8, 300, 300, 2, 8.0)
    known = randomized_svd(base, 20)
    truth = count_intruders(base + factors[0] @ factors[2], base, 10, 0.5)
    found = find_intruders(base, factors, known, count=10, epsilon=0.5, side="left")
    assert found.num_lower <= truth <= found.num_upper
    assert found.certain[:2].all() and not found.certain[2:].any()


def test_vectors_that_do_not_exist_are_not_counted() -> None:
    known, u = np.eye(4)[:, :2], np.eye(4)[:, 1:]
    u = np.where([True, False, True], u, np.nan)
    found = intruder_dimensions(u, known)
    np.testing.assert_array_equal(found.cosine_low, [1, np.nan, 0])
    assert (found.num_lower, found.num_upper) == (0, 1)
    nothing = intruder_dimensions(np.full((4, 2), np.nan), known)
    assert np.isnan(nothing.num_lower) and np.isnan(nothing.num_upper)
    unknown = intruder_dimensions(np.eye(4)[:, :2], np.full((4, 3), np.nan))  # nothing is known: anything may be
    assert (unknown.num_lower, unknown.num_upper) == (0, 2)
    assert np.isnan(cosine_bound(np.eye(4), np.full((4, 1), np.nan))).all()


def test_stacks_are_compared_one_by_one() -> None:
    rng = np.random.default_rng(9)
    u, u0 = np.linalg.qr(rng.standard_normal((3, 10, 4)))[0], np.linalg.qr(rng.standard_normal((3, 10, 6)))[0]
    together = intruder_dimensions(u, u0, epsilon=0.7, known_error=0.01, changed_error=np.full((3, 4), 0.02))
    for k in range(3):
        alone = intruder_dimensions(u[k], u0[k], epsilon=0.7, known_error=0.01, changed_error=0.02)
        np.testing.assert_allclose(together.cosine_high[k], alone.cosine_high)
        assert together.num_upper[k] == alone.num_upper


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(InputError, match="count: expected 1 to 5, got 6"):
        randomized_svd(np.ones((5, 9)), 6)
    with pytest.raises(InputError, match=r"\(5, 9\).*\(9, 2\), \(2, 5\)"):
        weight_operator(np.ones((5, 9)), [np.ones((9, 2)), np.ones((2, 5))])
    with pytest.raises(InputError, match=r"epsilon.*got 0"):
        intruder_dimensions(np.eye(3), np.eye(3), epsilon=0)
    with pytest.raises(InputError, match=r"one length.*got 3 and 4"):
        intruder_dimensions(np.eye(3), np.eye(4))
    with pytest.raises(InputError, match=r"num_steps.*got 0"):
        cosine_bound(np.eye(3), np.eye(3), num_steps=0)
