"""Directions of a weight change: its singular vectors, and how subspaces lie to each other and to the frozen weight.

Legend: basis (..., d, p) holds p orthonormal columns; factors F_0 … F_{m-1} are a chain in order, (..., d_in, w_0),
(..., w_{i-1}, w_i), (..., w_n, d_out), with ΔW = scale · F_0 … F_{m-1}. Leading axes are kept and broadcast.

Bases may be given as coordinates in any orthonormal basis that both share, which changes no angle. So chains are
compared without a long vector where their outer factors are given in common coordinates, those of [A | A'] (see
`grams.coordinates_from_gram`).

A column of NaN is a direction that does not exist (rank-deficient input); what needs it is NaN. So is everything that
comes of NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import multiply, norm, ratio
from linchain_analysis.measures.spectral import Array, frobenius_norm, spectrum

# A float32 basis of thousands of rows is within this of orthonormal; one that was never made orthonormal is not.
_ORTHONORMAL = 1e-5


@dataclass(frozen=True)
class Directions:
    """Leading singular triplets of a matrix (..., d_in, d_out) in row-vector convention y = x W.

    Vectors are unique up to a common sign, and inside a group of equal singular values up to a rotation.

    Attributes:
        left: (..., d_in, K) orthonormal columns, directions of the input; NaN where sigma counts as zero.
        sigma: (..., K) descending.
        right: (..., d_out, K) orthonormal columns, directions of the output; NaN alike.
        cut_off: A singular value up to cut_off · σ₁ counts as zero, and its vectors as arbitrary.
    """

    left: Array
    sigma: Array
    right: Array
    cut_off: float


def drop_arbitrary(left: Array, sigma: Array, right: Array) -> Directions:
    """Put NaN for the vectors of singular values up to max(d_in, d_out) · ε · σ₁, which are rounding, ε of float64."""
    cut_off = max(left.shape[-2], right.shape[-2]) * float(np.finfo(np.float64).eps)
    present = (sigma > cut_off * sigma[..., :1]) & (sigma > 0)
    kept = present[..., None, :]
    return Directions(np.where(kept, left, np.nan), sigma, np.where(kept, right, np.nan), cut_off)


def leading_vectors(
    factors: Sequence[NDArray[Any]], *, scale: float | NDArray[Any] = 1.0, count: int | None = None
) -> Directions:
    """Return the leading singular triplets of ΔW from its factors.

    Thin QR of the outer factors, F_0 = Q_a R_a and F_{m-1}ᵀ = Q_b R_b, and the SVD U Σ Vᵀ of the core
    scale · R_a F_1 … F_{m-2} R_bᵀ: the vectors are Q_a U and Q_b V. In float64.

    Args:
        factors: At least two.
        scale: Number or (...,).
        count: K; all min(d_in, w_0, …, w_n, d_out) that ΔW can have where it is None.

    Returns:
        The triplets. Of ΔW = 0 sigma is 0 and every vector NaN; of factors that hold NaN or Inf all is NaN.
    """
    chain = [np.asarray(factor, dtype=np.float64) for factor in factors]
    possible = min(min(factor.shape[-2:]) for factor in chain)
    count = possible if count is None else count
    if not 1 <= count <= possible:
        raise InputError("count", expected=f"1 to {possible} directions", got=str(count), do="ask for fewer")
    q_left, q_right, core = _reduce(chain)
    core = np.asarray(scale, dtype=np.float64)[..., None, None] * core
    finite = np.asarray(np.isfinite(core).all(axis=(-2, -1)))[..., None]
    u, sigma, vt = np.linalg.svd(np.where(finite[..., None], core, 0.0), full_matrices=False)
    sigma = np.where(finite, sigma, np.nan)[..., :count]
    left, right = q_left @ u[..., :count], q_right @ np.swapaxes(vt, -1, -2)[..., :count]
    return drop_arbitrary(left, sigma, right)


def principal_angles(basis_1: NDArray[Any], basis_2: NDArray[Any]) -> Array:
    """Return the principal angles between two subspaces in radians, 0 … π/2.

    The cosines are the singular values of U₁ᵀU₂, the sines those of (I − U₁U₁ᵀ)U₂ for the smaller U₂; the angle of
    the pair keeps its digits at both ends (Björck & Golub 1973, Math. Comp. 27(123)).

    Args:
        basis_1: (..., d, p) orthonormal columns.
        basis_2: (..., d, q) alike.

    Returns:
        (..., min(p, q)) ascending; accurate to rounding of the bases.
    """
    large, small = _two_bases(basis_1, basis_2)
    if large.shape[-1] < small.shape[-1]:
        large, small = small, large
    cosines = np.swapaxes(large, -1, -2) @ small
    sines = spectrum(small - large @ cosines)[..., ::-1]
    return np.asarray(np.arctan2(sines, spectrum(cosines)))


def principal_angles_of_overlap(overlap: NDArray[Any]) -> Array:
    """Return the principal angles from U₁ᵀU₂ (..., p, q) alone, ascending; those below 1e-7 are rounding."""
    return np.asarray(np.arccos(np.minimum(spectrum(overlap), 1.0)))


def subspace_similarity(basis_1: NDArray[Any], basis_2: NDArray[Any], i: int, j: int) -> Array:
    """Return φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖²_F / min(i, j), in 0 … 1 (LoRA, arXiv 2106.09685, section 7.2).

    Args:
        basis_1: (..., d, p) orthonormal columns in order of importance.
        basis_2: (..., d, q) alike.
        i: How many columns of the first, 1 … p.
        j: How many columns of the second, 1 … q.

    Returns:
        (...,); by chance, for random subspaces, max(i, j)/d on average.
    """
    grid = similarity_grid(basis_1, basis_2)
    for name, value, top in (("i", i, grid.shape[-2]), ("j", j, grid.shape[-1])):
        if not 1 <= value <= top:
            raise InputError(name, expected=f"1 to {top} columns", got=str(value), do="ask for fewer")
    return np.asarray(grid[..., i - 1, j - 1])


def similarity_grid(basis_1: NDArray[Any], basis_2: NDArray[Any]) -> Array:
    """Return φ(i, j) for all i and j, (..., p, q), φ(i, j) at [..., i − 1, j − 1]."""
    one, two = _two_bases(basis_1, basis_2)
    return similarity_grid_of_overlap(np.swapaxes(one, -1, -2) @ two)


def similarity_grid_of_overlap(overlap: NDArray[Any]) -> Array:
    """Return φ(i, j) for all i and j from U₁ᵀU₂ (..., p, q) alone; no digits are lost by that."""
    overlap = np.asarray(overlap, dtype=np.float64)
    sums = np.cumsum(np.cumsum(overlap**2, axis=-2), axis=-1)
    rows, columns = np.indices(overlap.shape[-2:]) + 1
    return np.asarray(sums / np.minimum(rows, columns))


def alignment(
    basis: NDArray[Any], factors: Sequence[NDArray[Any]], *, side: Literal["left", "right"] = "left"
) -> Array:
    """Return the share of ΔW inside a subspace: ‖UᵀΔW‖_F/‖ΔW‖_F, or ‖ΔW U‖_F/‖ΔW‖_F for the right side, in 0 … 1.

    Args:
        basis: U, (..., d_in, K) for the left side, (..., d_out, K) for the right; orthonormal columns.
        factors: Of ΔW, whose scale does not matter here.
        side: Inputs (left) or outputs (right) of the weight.

    Returns:
        (...,); NaN for ΔW = 0. By chance, for a random subspace, the root mean square is √(K/d).
    """
    chain = [np.asarray(factor, dtype=np.float64) for factor in factors]
    if side == "right":
        chain = [np.swapaxes(factor, -1, -2) for factor in reversed(chain)]
    basis = _basis(basis, "basis", chain[0].shape[-2])
    q_left, _, core = _reduce(chain)
    return ratio(norm((np.swapaxes(basis, -1, -2) @ q_left) @ core), norm(core))


def amplification(
    factors: Sequence[NDArray[Any]],
    base: Any,
    *,
    scale: float | NDArray[Any] = 1.0,
    count: int | None = None,
) -> Array:
    """Return ‖ΔW‖_F/‖UᵀW₀V‖_F, U and V the top singular directions of ΔW (LoRA, arXiv 2106.09685, section 7.3).

    Args:
        factors: Of ΔW.
        base: W₀ (..., d_in, d_out), or anything of that shape that multiplies by `@`, such as a SciPy LinearOperator.
        scale: Number or (...,).
        count: How many directions; all that ΔW has where it is None. Those that a rank-deficient ΔW lacks are left out.

    Returns:
        (...,); NaN where ΔW or UᵀW₀V is 0.
    """
    every = leading_vectors(factors, scale=scale)
    top = leading_vectors(factors, scale=scale, count=count)
    absent = np.isnan(top.left) & np.isfinite(top.sigma)[..., None, :]
    left = np.where(absent, 0.0, top.left)
    right = np.where(np.isnan(top.right), 0.0, top.right)
    return ratio(frobenius_norm(every.sigma), norm(np.swapaxes(left, -1, -2) @ (base @ right)))


def _reduce(chain: list[Array]) -> tuple[Array, Array, Array]:
    """Q_a (..., d_in, p), Q_b (..., d_out, q) and the core R_a F_1 … F_{m-2} R_bᵀ (..., p, q)."""
    q_left, r_left = np.linalg.qr(chain[0])
    q_right, r_right = np.linalg.qr(np.swapaxes(chain[-1], -1, -2))
    return q_left, q_right, multiply([r_left, *chain[1:-1], np.swapaxes(r_right, -1, -2)])


def _two_bases(basis_1: NDArray[Any], basis_2: NDArray[Any]) -> tuple[Array, Array]:
    one = _basis(basis_1, "basis_1", None)
    return one, _basis(basis_2, "basis_2", one.shape[-2])


def _basis(basis: NDArray[Any], place: str, length: int | None) -> Array:
    """The basis in float64 with NaN for every column that is not finite; an error where it is not orthonormal."""
    basis = np.asarray(basis, dtype=np.float64)
    if basis.ndim < 2 or (length is not None and basis.shape[-2] != length):
        rows = "d" if length is None else length
        raise InputError(
            place, expected=f"shape (..., {rows}, columns)", got=str(basis.shape), do="give vectors as columns"
        )
    finite = np.isfinite(basis).all(axis=-2, keepdims=True)
    known = np.where(finite, basis, 0.0)
    error = np.abs(np.swapaxes(known, -1, -2) @ known - np.eye(basis.shape[-1]) * finite)
    if error.max(initial=0.0) > _ORTHONORMAL:
        raise InputError(
            place,
            expected="orthonormal columns",
            got=f"|UᵀU − I| up to {error.max():.1e}",
            do="take the Q of a QR decomposition",
        )
    return np.where(finite, basis, np.nan)
