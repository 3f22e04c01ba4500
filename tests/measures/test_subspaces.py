from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.sparse.linalg import aslinearoperator

from linchain_analysis.errors import InputError
from linchain_analysis.measures import subspaces
from linchain_analysis.measures.grams import coordinates_from_gram


def basis(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal(shape))[0]


def chain(rng: np.random.Generator, *sizes: int) -> list[np.ndarray]:
    return [rng.standard_normal(pair) for pair in itertools.pairwise(sizes)]


def test_angles_of_planes_computed_by_hand() -> None:
    tilt = 0.3
    one = np.eye(4)[:, :2]
    two = np.array([[1, 0], [0, np.cos(tilt)], [0, np.sin(tilt)], [0, 0]])
    np.testing.assert_allclose(subspaces.principal_angles(one, two), [0, tilt], atol=1e-15)
    np.testing.assert_allclose(subspaces.principal_angles_of_overlap(one.T @ two), [0, tilt], atol=1e-7)
    assert subspaces.subspace_similarity(one, two, 1, 2) == 1
    assert subspaces.subspace_similarity(one, two, 2, 2) == pytest.approx((1 + np.cos(tilt) ** 2) / 2)
    np.testing.assert_allclose(
        subspaces.similarity_grid(one, two), [[1, 1], [1, (1 + np.cos(tilt) ** 2) / 2]], atol=1e-15
    )


@pytest.mark.parametrize("tilt", [1e-12, 1e-8, 0.7, np.pi / 2 - 1e-8, np.pi / 2])
def test_angles_keep_their_digits_at_both_ends(tilt: float) -> None:
    one = np.array([[1.0], [0.0]])
    two = np.array([[np.cos(tilt)], [np.sin(tilt)]])
    # 2e-16: the rounding of cos and sin, as an angle.
    np.testing.assert_allclose(subspaces.principal_angles(one, two), [tilt], rtol=1e-12, atol=2e-16)


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 5), st.integers(5, 12))
def test_angles_are_those_of_the_spaces_and_not_of_the_bases(seed: int, p: int, q: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = basis(rng, 3, d, p), basis(rng, 3, d, q)
    angles = subspaces.principal_angles(one, two)
    assert angles.shape == (3, min(p, q))
    assert (np.diff(angles, axis=-1) >= -1e-12).all()
    assert ((angles >= 0) & (angles <= np.pi / 2 + 1e-12)).all()
    for k in range(3):  # SciPy's twin, descending, takes arccos even of a cosine near 1: √ε
        np.testing.assert_allclose(angles[k], subspace_angles(one[k], two[k])[::-1], atol=1e-7)
    cosines = np.linalg.svd(np.swapaxes(one, -1, -2) @ two, compute_uv=False)
    np.testing.assert_allclose(np.cos(angles), cosines, atol=1e-12)
    turned = one @ basis(rng, p, p)
    rotation = basis(rng, d, d)
    np.testing.assert_allclose(subspaces.principal_angles(turned, two), angles, atol=1e-12)
    np.testing.assert_allclose(subspaces.principal_angles(rotation @ one, rotation @ two), angles, atol=1e-12)
    np.testing.assert_allclose(subspaces.principal_angles(two, one), angles, atol=1e-12)
    grid = subspaces.similarity_grid(one, two)
    assert ((grid >= 0) & (grid <= 1 + 1e-12)).all()
    np.testing.assert_allclose(grid[:, -1, -1] * min(p, q), (np.cos(angles) ** 2).sum(-1), atol=1e-12)
    dense = np.linalg.norm(np.swapaxes(one[..., :1], -1, -2) @ two, axis=(-2, -1)) ** 2
    np.testing.assert_allclose(subspaces.subspace_similarity(one, two, 1, q), dense, atol=1e-12)


def test_random_subspaces_are_similar_by_chance() -> None:
    rng = np.random.default_rng(0)
    one, two = basis(rng, 400, 50, 2), basis(rng, 400, 50, 5)
    # Each of the 400 draws varies by about 0.04, so that their mean is within 0.01 of 5/50.
    assert subspaces.subspace_similarity(one, two, 2, 5).mean() == pytest.approx(5 / 50, abs=0.01)


@pytest.mark.parametrize("widths", [(4,), (4, 6, 4), (3, 3, 3, 3), (12,)])
def test_leading_vectors_are_those_of_the_dense_product(widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    factors = chain(rng, 20, *widths, 9)
    found = subspaces.leading_vectors(factors, scale=-2.0)
    dense = -2.0 * (np.linalg.multi_dot(factors) if len(factors) > 2 else factors[0] @ factors[1])
    count = min(*widths, 9)
    assert found.left.shape == (20, count)
    np.testing.assert_allclose(found.sigma, np.linalg.svd(dense)[1][:count], rtol=1e-12)
    np.testing.assert_allclose(found.left * found.sigma @ found.right.T, dense, atol=1e-12 * found.sigma[0])
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-13)
    first = subspaces.leading_vectors(factors, scale=-2.0, count=2)
    np.testing.assert_array_equal(first.sigma, found.sigma[:2])


def test_measures_do_not_depend_on_the_gauge() -> None:
    rng = np.random.default_rng(2)
    factors = chain(rng, 30, 4, 4, 4, 20)
    mixer = rng.standard_normal((4, 4))
    other = [factors[0], factors[1] @ mixer, np.linalg.inv(mixer) @ factors[2], factors[3]]
    base, known = rng.standard_normal((30, 20)), basis(rng, 30, 5)
    # The condition number of the mixer multiplies the rounding of its inverse.
    rounding = 1e-13 * np.linalg.cond(mixer) ** 2
    a, b = subspaces.leading_vectors(factors), subspaces.leading_vectors(other)
    np.testing.assert_allclose(b.sigma, a.sigma, rtol=rounding)
    np.testing.assert_allclose(subspaces.principal_angles(a.left, b.left), 0, atol=rounding)
    np.testing.assert_allclose(subspaces.alignment(known, other), subspaces.alignment(known, factors), rtol=rounding)
    np.testing.assert_allclose(
        subspaces.amplification(other, base), subspaces.amplification(factors, base), rtol=rounding
    )


def test_common_coordinates_replace_long_vectors() -> None:
    rng = np.random.default_rng(3)
    one, two = chain(rng, 300, 4, 4, 200), chain(rng, 300, 3, 200)
    joint = np.hstack([one[0], two[0]])
    short = coordinates_from_gram((joint.T @ joint)[None])[0]
    dense = [subspaces.leading_vectors(factors).left for factors in (one, two)]
    small = [
        subspaces.leading_vectors([short[:, :4], *one[1:]]).left,
        subspaces.leading_vectors([short[:, 4:], *two[1:]]).left,
    ]
    assert small[0].shape == (7, 4)
    np.testing.assert_allclose(subspaces.principal_angles(*small), subspaces.principal_angles(*dense), atol=1e-12)
    np.testing.assert_allclose(subspaces.similarity_grid(*small), subspaces.similarity_grid(*dense), atol=1e-12)


def test_alignment_and_amplification_are_those_of_the_dense_definitions() -> None:
    rng = np.random.default_rng(4)
    factors = [rng.standard_normal((2, *pair)) for pair in itertools.pairwise((15, 3, 5, 11))]
    delta = 0.5 * factors[0] @ factors[1] @ factors[2]
    left, right, base = basis(rng, 15, 4), basis(rng, 11, 4), rng.standard_normal((2, 15, 11))
    size = np.linalg.norm(delta, axis=(-2, -1))
    np.testing.assert_allclose(
        subspaces.alignment(left, factors), np.linalg.norm(left.T @ delta, axis=(-2, -1)) / size, rtol=1e-12
    )
    np.testing.assert_allclose(
        subspaces.alignment(right, factors, side="right"),
        np.linalg.norm(delta @ right, axis=(-2, -1)) / size,
        rtol=1e-12,
    )
    for count in (None, 2):
        u, _, vt = np.linalg.svd(delta)
        u, v = u[..., : count or 3], np.swapaxes(vt, -1, -2)[..., : count or 3]
        expected = size / np.linalg.norm(np.swapaxes(u, -1, -2) @ base @ v, axis=(-2, -1))
        np.testing.assert_allclose(
            subspaces.amplification(factors, base, scale=np.array([0.5, 0.5]), count=count), expected, rtol=1e-11
        )
    one = [factor[0] for factor in factors]
    np.testing.assert_allclose(
        subspaces.amplification(one, aslinearoperator(base[0]), scale=0.5),
        subspaces.amplification(one, base[0], scale=0.5),
        rtol=1e-12,
    )


def test_amplification_by_hand() -> None:
    # ΔW = 6 e_1 e_2ᵀ, of which W_0 holds 1.5.
    factors = [np.array([[2.0], [0.0]]), np.array([[0.0, 3.0]])]
    assert subspaces.amplification(factors, np.array([[7.0, 1.5], [7.0, 7.0]])) == pytest.approx(4)
    assert subspaces.alignment(np.array([[1.0], [0.0]]), factors) == 1
    assert subspaces.alignment(np.array([[0.0], [1.0]]), factors) == 0


def test_zero_rank_deficient_and_broken_chains_have_defined_results() -> None:
    rng = np.random.default_rng(5)
    stack = [rng.standard_normal((4, *pair)) for pair in itertools.pairwise((10, 3, 8))]
    stack[1][0] = 0
    stack[1][1, 2] = stack[1][1, 0]  # rank 2
    stack[0][2, 0, 0] = np.nan
    stack[0][3, 0, 0] = np.inf
    found = subspaces.leading_vectors(stack)
    np.testing.assert_array_equal(found.sigma[0], 0)
    assert np.isnan(found.left[0]).all()
    np.testing.assert_array_equal(np.isnan(found.right[1]).any(axis=0), [False, False, True])
    assert np.isnan(found.sigma[2:]).all() and np.isnan(found.left[2:]).all()

    known, base = basis(rng, 10, 4), rng.standard_normal((10, 8))
    shares = subspaces.alignment(known, stack)
    np.testing.assert_array_equal(np.isnan(shares), [True, False, True, True])
    gains = subspaces.amplification(stack, base)
    np.testing.assert_array_equal(np.isnan(gains), [True, False, True, True])
    two = subspaces.leading_vectors([factor[1] for factor in stack], count=2)
    assert gains[1] == pytest.approx(np.linalg.norm(two.sigma) / np.linalg.norm(two.left.T @ base @ two.right))
    assert np.isnan(subspaces.amplification([factor[1] for factor in stack], np.zeros((10, 8))))

    grid = subspaces.similarity_grid(found.left[1], known)
    assert np.isfinite(grid[:2]).all() and np.isnan(grid[2:]).all()
    assert np.isnan(subspaces.principal_angles(found.left[1], known)).all()


def test_what_cannot_be_compared_is_refused() -> None:
    rng = np.random.default_rng(6)
    good = basis(rng, 10, 3)
    with pytest.raises(InputError, match=r"basis_2.*\(\.\.\., 10, columns\).*\(9, 3\)"):
        subspaces.principal_angles(good, basis(rng, 9, 3))
    with pytest.raises(InputError, match=r"basis_1.*orthonormal"):
        subspaces.similarity_grid(2 * good, good)
    with pytest.raises(InputError, match="i: expected 1 to 3 columns, got 4"):
        subspaces.subspace_similarity(good, good, 4, 1)
    with pytest.raises(InputError, match="count: expected 1 to 3 directions, got 5"):
        subspaces.leading_vectors([np.ones((10, 3)), np.ones((3, 8))], count=5)
    float32 = basis(rng, 3000, 16).astype(np.float32)
    assert subspaces.principal_angles(float32, float32).max() < 1e-6
