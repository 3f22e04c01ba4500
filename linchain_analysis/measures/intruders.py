"""Intruder dimensions: leading singular vectors of a changed weight that resemble none of the weight it started from.

Shuttleworth et al. 2024 (arXiv 2410.21228) count them with all singular vectors of W₀ known. With only some known, an
upper and a lower bound are what can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from linchain_analysis.errors import InputError
from linchain_analysis.measures.randomized import (
    keep_accurate,
    randomized_svd,
    triplet_residuals,
    vector_errors,
    weight_operator,
)
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.subspaces import Directions

_ROUNDING = 1e-12
# Where to look between neighbouring nodes, as parts of their distance: evenly, and ever closer to both.
_NEAR = 0.03 * 0.75 ** np.arange(60)
_PLACES = np.concatenate([_NEAR, np.linspace(0.03, 0.97, 31), 1 - _NEAR])


@dataclass(frozen=True)
class Intruders:
    """Which leading singular vectors of a changed weight resemble none of W₀'s.

    Of each vector the largest |cos| with any singular vector of W₀ lies between two bounds.

    Attributes:
        cosine_low: (..., k), found with a known vector of W₀; NaN for a vector that does not exist.
        cosine_high: (..., k), what no vector of W₀, known or not, can exceed; NaN alike.
        epsilon: A vector is an intruder if its largest |cos| is below this.
    """

    cosine_low: Array
    cosine_high: Array
    epsilon: float

    @property
    def possible(self) -> NDArray[np.bool_]:
        """(..., k), matched by no known vector."""
        return np.asarray(self.cosine_low < self.epsilon)

    @property
    def certain(self) -> NDArray[np.bool_]:
        """(..., k), and beyond doubt by no unknown one."""
        return np.asarray(self.possible & (self.cosine_high < self.epsilon))

    @property
    def num_upper(self) -> Array:
        """(...,) upper bound on the number of intruders; NaN where no vector could be compared."""
        return self._count(self.possible)

    @property
    def num_lower(self) -> Array:
        """(...,) lower bound, alike."""
        return self._count(self.certain)

    def _count(self, which: NDArray[np.bool_]) -> Array:
        compared = np.isfinite(self.cosine_low).any(axis=-1)
        return np.asarray(np.where(compared, which.sum(axis=-1), np.nan))


def intruder_dimensions(
    changed: NDArray[Any],
    known: NDArray[Any],
    *,
    epsilon: float = 0.5,
    complete: bool = False,
    outside: NDArray[Any] | None = None,
    changed_error: float | NDArray[Any] = 0.0,
    known_error: float | NDArray[Any] = 0.0,
) -> Intruders:
    """Find the intruder dimensions of W₀ + ΔW (Shuttleworth et al. 2024, arXiv 2410.21228), in bounds.

    By definition u is one if max |uᵀv| < ε over all singular vectors v of W₀. With only K known, U_K: a vector matched
    by none of them may still match another, so their count is an upper bound. Every other v is orthogonal to U_K, so
    |uᵀv| = |vᵀ(I − U_K U_Kᵀ)u| ≤ ‖(I − U_K U_Kᵀ)u‖: where that is below ε as well, u is an intruder whatever the rest
    of W₀ is. The norm is small only for intruders that mix known vectors of W₀; for a direction new to W₀ it is near 1
    as long as K is far below d, and then `cosine_bound` tells.

    Computed vectors are inexact. With sines of error e_u of u and e_i of the known ones the largest |cos| is at least
    max_i(|uᵀu_i| − e_i) − e_u, and at most max(max_i(|uᵀu_i| + e_i), outside + Σ_i e_i |uᵀu_i|) + e_u. `find_intruders`
    takes all of these steps.

    Args:
        changed: (..., d, k) leading singular vectors of W₀ + ΔW, in columns. The paper takes the left ones of the
            weight as nn.Linear stores it, which are the right ones (`Directions.right`) here.
        known: (..., d, K) singular vectors of W₀ of the same side, any K of them; see `keep_accurate`.
        epsilon: In (0, 1].
        complete: Whether `known` has every vector of W₀ with σ > 0, so that nothing else can match and both bounds
            are the count. (Of a tall W₀ they do not span the space, so that the norm alone cannot tell.)
        outside: (..., k) from `cosine_bound(W₀, changed, known)`; the norm above is used where that is smaller.
        changed_error: e_u, number or (..., k), from `vector_errors`.
        known_error: e_i, number or (..., K), alike.

    Returns:
        The comparison, column by column. A column that holds NaN or Inf is a vector that does not exist: it is not
        counted, and matches nothing. Where `changed` has no other column the counts are NaN.
    """
    if not 0 < epsilon <= 1:
        raise InputError("epsilon", expected="a cosine in (0, 1]", got=str(epsilon), do="take 0.5")
    changed, known = np.asarray(changed, dtype=np.float64), np.asarray(known, dtype=np.float64)
    if changed.shape[-2] != known.shape[-2]:
        raise InputError(
            "changed, known",
            expected="vectors of one length",
            got=f"{changed.shape[-2]} and {known.shape[-2]}",
            do="compare the same side of both weights",
        )
    exists = np.isfinite(changed).all(axis=-2)
    present = np.isfinite(known).all(axis=-2)
    vectors = np.where(exists[..., None, :], changed, 0.0)
    basis = np.where(present[..., None, :], known, 0.0)
    products = np.swapaxes(basis, -1, -2) @ vectors
    cosines = np.abs(products)
    slack = np.where(present, np.broadcast_to(known_error, present.shape), 0.0)[..., None]
    own = np.where(exists, np.broadcast_to(changed_error, exists.shape), 0.0)
    beyond = np.linalg.norm(vectors - basis @ products, axis=-2)
    if outside is not None:
        beyond = np.fmin(beyond, outside)
    if complete:
        beyond = np.zeros_like(beyond)
    low = (cosines - slack).max(axis=-2, initial=0.0) - own
    high = np.maximum((cosines + slack).max(axis=-2, initial=0.0), beyond + (slack * cosines).sum(axis=-2)) + own
    low, high = (np.where(exists, np.clip(bound, 0.0, 1.0), np.nan) for bound in (low, high))
    return Intruders(low, high, epsilon)


def find_intruders(
    base: Any,
    factors: Sequence[NDArray[Any]],
    known: Directions,
    *,
    scale: float = 1.0,
    count: int = 10,
    epsilon: float = 0.5,
    side: Literal["left", "right"] = "right",
    num_steps: int = 60,
    seed: int = 0,
) -> Intruders:
    """Return the intruders among the leading singular vectors of W₀ + ΔW, errors of computed vectors accounted for.

    Args:
        base: W₀ (d_in, d_out), array or LinearOperator.
        factors: Of ΔW.
        known: Leading triplets of W₀ by `randomized_svd`, once for all steps of a run; K of 64 is usual.
        scale: That of the chain.
        count: k, how many vectors of W₀ + ΔW; as many again are computed beside them, to tell them apart.
        epsilon: See `intruder_dimensions`.
        side: Outputs (right), the side that the paper looks at, or inputs (left).
        num_steps: See `cosine_bound`; 0 does without it.
        seed: Of the random samples.
    """
    operator, changed_operator = weight_operator(base), weight_operator(base, factors, scale=scale)
    more = min(2 * count, *operator.shape)
    changed = randomized_svd(changed_operator, more, num_power_iterations=4, seed=seed)
    changed_error = vector_errors(changed.sigma, triplet_residuals(changed_operator, changed))
    known_error = vector_errors(known.sigma, triplet_residuals(operator, known))
    accurate = keep_accurate(known, known_error)
    vectors, basis = (changed.right, accurate.right) if side == "right" else (changed.left, accurate.left)
    vectors = vectors[:, :count]
    turned = operator.T if side == "right" else operator
    outside = cosine_bound(turned, vectors, basis, num_steps=num_steps) if num_steps else None
    return intruder_dimensions(
        vectors,
        basis,
        epsilon=epsilon,
        outside=outside,
        changed_error=changed_error[:count],
        known_error=known_error,
    )


def cosine_bound(
    matrix: Any, vectors: NDArray[Any], known: NDArray[Any] | None = None, *, num_steps: int = 60
) -> Array:
    """Return an upper bound on |vᵀr| over all left singular vectors v of M, r the part of u outside the known ones.

    That is |cos(u, v)| for every v that is not known, and for every v at all where `known` is None.

    r spreads over the eigenvectors of M Mᵀ with weights |vᵀr|². Lanczos from r gives the polynomials p_0 … p_{m−1} that
    are orthonormal with respect to them, and no weight, at whatever eigenvalue x, exceeds the Christoffel function:
    |vᵀr|² ≤ ‖r‖²/Σ p_k(x)² (Akhiezer 1965, The classical moment problem, section 2.5). The bound is the largest value
    of that over all x, found to 0.1 %; it falls like 1/√m for a vector that spreads wide. Nothing is asked of the
    spectrum or of the accuracy of `known`; in a group of equal singular values it bounds the cosine with the group.

    Args:
        matrix: M (d, …), an array or LinearOperator; its transpose for right vectors.
        vectors: (d, k) unit columns u. A column that is not finite gives NaN.
        known: (d, K) orthonormal columns to leave out, which makes the bound tighter; ones not finite are ignored.
        num_steps: m; 2 m products of M with k columns, and memory for m d k numbers.

    Returns:
        (k,), in 0 … 1.
    """
    if num_steps < 1:
        raise InputError("num_steps", expected="at least 1", got=str(num_steps), do="take 60")
    operator = matrix if isinstance(matrix, LinearOperator) else weight_operator(matrix)
    vectors = np.asarray(vectors, dtype=np.float64)
    exists = np.isfinite(vectors).all(axis=0)
    rest = np.where(exists, vectors, 0.0)
    if known is not None:
        basis = np.asarray(known, dtype=np.float64)
        basis = basis[:, np.isfinite(basis).all(axis=0)]
        for _ in range(2):  # the second pass removes what rounding left
            rest = rest - basis @ (basis.T @ rest)
    size = np.linalg.norm(rest, axis=0)
    diagonal, beside = _lanczos(operator, rest / np.where(size > _ROUNDING, size, 1.0), num_steps)
    share = np.array([_largest_weight(*pair) for pair in zip(diagonal.T, beside.T, strict=True)])
    bound = np.where(size > _ROUNDING, size * np.sqrt(share), size)
    return np.asarray(np.where(exists, np.minimum(bound, 1.0), np.nan))


def _lanczos(operator: Any, start: Array, num_steps: int) -> tuple[Array, Array]:
    """Jacobi coefficients (m, k), (m, k) of M Mᵀ from k start vectors, orthogonalised in full, twice."""
    space = np.zeros((num_steps + 1, *start.shape))
    space[0] = start
    diagonal, beside = np.zeros((2, num_steps, start.shape[1]))
    for step in range(num_steps):
        vector = operator.matmat(operator.rmatmat(space[step]))
        size = np.linalg.norm(vector, axis=0)
        diagonal[step] = np.einsum("dk,dk->k", space[step], vector)
        for _ in range(2):
            overlap = np.einsum("jdk,dk->jk", space[: step + 1], vector)
            vector = vector - np.einsum("jdk,jk->dk", space[: step + 1], overlap)
        beside[step] = np.linalg.norm(vector, axis=0)
        # What is left at rounding level is no further direction: the vectors so far span all that the start reaches.
        beside[step] = np.where(beside[step] > _ROUNDING * size, beside[step], 0.0)
        space[step + 1] = np.divide(vector, beside[step], out=np.zeros_like(vector), where=beside[step] > 0)
    return diagonal, beside


def _largest_weight(diagonal: Array, beside: Array) -> float:
    """max over x of 1/Σ p_k(x)², from the Jacobi coefficients of one measure of mass 1."""
    ends = np.flatnonzero(beside == 0)
    num = int(ends[0]) + 1 if len(ends) else len(diagonal)
    jacobi = np.diag(diagonal[:num]) + np.diag(beside[: num - 1], 1) + np.diag(beside[: num - 1], -1)
    nodes, vectors = np.linalg.eigh(jacobi)
    # At a node it is the Gauss weight, which eigenvectors give where the recurrence below has lost its digits.
    # Nodes at rounding distance are one eigenvalue that rounding has split.
    same = np.abs(nodes[:, None] - nodes) <= _ROUNDING * np.abs(nodes).max()
    largest = float((same @ vectors[0] ** 2).max())
    if num < len(diagonal):
        return largest  # the measure is nothing but its nodes
    # All zeros of the polynomials lie between the outer nodes, so that the maximum does too.
    # Close to a node the peak of an eigenvalue that is nearly found is as narrow as its distance from the node.
    x = nodes[:-1] + _PLACES[:, None] * np.diff(nodes)
    previous, current, total = np.zeros_like(x), np.ones_like(x), np.ones_like(x)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(num - 1):
            below = beside[k - 1] if k else 0.0
            previous, current = current, ((x - diagonal[k]) * current - below * previous) / beside[k]
            total = total + current**2
    return float(np.fmax(largest, np.nanmax(1.0 / total, initial=0.0)))
