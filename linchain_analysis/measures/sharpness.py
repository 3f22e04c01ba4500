"""Sharpness: the top eigenvalue of a Hessian that is known by its products only, and the edge of stability.

Sharpness depends on the gauge and on the parametrisation. Between chains of different depth compare it with the
optimiser's edge, sharpness / `stability_edge`, never by itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array

Which = Literal["LA", "LM"]
OptimizerKind = Literal["gradient_descent", "heavy_ball", "adam"]

# Newer versions of SciPy draw a vector where Lanczos ends early, from fresh entropy unless they are given a generator.
_TAKES_GENERATOR = "rng" in inspect.signature(eigsh).parameters


@dataclass(frozen=True)
class TopEigenvalue:
    """The result of `top_eigenvalue`, M being H or D^-½ H D^-½.

    Attributes:
        value: λ; NaN where a product was not finite or the iteration did not converge.
        vector: (dimension,) unit eigenvector y of M; that of H x = λ D x is x = D^-½ y. NaN where value is.
        num_products: Hessian-vector products taken, the check of the residual included.
        residual: ‖M y − λ y‖, in the unit of λ: M, being symmetric, has an eigenvalue within this of λ.
        converged: Whether the tolerance was reached.
    """

    value: float
    vector: Array
    num_products: int
    residual: float
    converged: bool


class _NotFiniteError(Exception):
    """A product held NaN or Inf."""


def top_eigenvalue(
    hessian_vector_product: Callable[[Array], NDArray[Any]],
    dimension: int,
    *,
    preconditioner: NDArray[Any] | None = None,
    which: Which = "LA",
    tolerance: float = 1e-4,
    max_restarts: int = 100,
    num_basis_vectors: int = 20,
    seed: int = 0,
) -> TopEigenvalue:
    """Return the top eigenvalue of a symmetric H by restarted Lanczos (ARPACK), from products H v alone.

    Args:
        hessian_vector_product: v (dimension,) float64 ↦ H v (dimension,), any real dtype; the same H every time: fixed
            batch, no dropout. Products in float32 carry a tolerance down to about 1e-6.
        dimension: Number of parameters.
        preconditioner: Diagonal D > 0, (dimension,); the eigenvalue is that of D^-½ H D^-½, which D^-1 H shares. For
            Adam at step t, D = (1 − β₁ᵗ)(√(v_t/(1 − β₂ᵗ)) + ε) (Cohen et al. 2022, arXiv 2207.14484).
        which: `LA` the largest, `LM` the largest in absolute value.
        tolerance: Relative accuracy of the eigenvalue asked of ARPACK; 0 is machine precision.
        max_restarts: Of the iteration, before it gives up.
        num_basis_vectors: Lanczos vectors between restarts, dimension numbers each.
        seed: Of the start vector; the global generator is left alone.

    Returns:
        The eigenvalue with its vector and residual. Of H = 0: value 0 and the start vector.
    """
    root = _check(dimension, preconditioner, which, tolerance, num_basis_vectors)
    count = 0

    def multiply(vector: Array) -> Array:
        nonlocal count
        count += 1
        vector = vector.reshape(-1)
        product = np.asarray(hessian_vector_product(vector / root), dtype=np.float64)
        if product.shape != (dimension,):
            raise InputError(
                "hessian_vector_product",
                expected=f"a product of shape ({dimension},)",
                got=str(product.shape),
                do="flatten the parameters in one fixed order",
            )
        if not np.isfinite(product).all():
            raise _NotFiniteError
        return np.asarray(product / root)

    generator = np.random.default_rng(seed)
    start = generator.standard_normal(dimension)
    start /= np.linalg.norm(start)
    try:
        image = multiply(start)
        if dimension == 1 or not image.any():
            # ARPACK takes neither; a random vector that H sends to 0 says that H is 0.
            return TopEigenvalue(float(start @ image), start, count, 0.0, True)
        operator = LinearOperator((dimension, dimension), matvec=multiply, dtype=np.float64)
        options = {"rng": generator} if _TAKES_GENERATOR else {}
        values, vectors = eigsh(
            operator,
            k=1,
            which=which,
            v0=start,
            tol=tolerance,
            maxiter=max_restarts,
            ncv=min(num_basis_vectors, dimension),
            **options,
        )
        value, vector = float(values[0]), np.asarray(vectors[:, 0])
        residual = float(np.linalg.norm(multiply(vector) - value * vector))
    except (_NotFiniteError, ArpackNoConvergence):
        return TopEigenvalue(math.nan, np.full(dimension, np.nan), count, math.nan, False)
    return TopEigenvalue(value, vector, count, residual, True)


def stability_edge(optimizer: OptimizerKind, learning_rate: float, beta1: float = 0.9) -> float:
    """Return the sharpness at which full-batch training on a quadratic stops being stable, in nats/parameter².

    `gradient_descent` 2/η and `heavy_ball` (p ← β p − η g) (2 + 2β)/η, both on H (Cohen et al. 2021, arXiv 2103.00065);
    `adam` (2 + 2β₁)/((1 − β₁) η), 38/η at β₁ = 0.9, on D^-½ H D^-½ (Cohen et al. 2022, arXiv 2207.14484). Weight decay
    is not in it.

    Args:
        optimizer: Its kind.
        learning_rate: η ≥ 0; at 0 the edge is Inf.
        beta1: β or β₁ in [0, 1); gradient descent does not look at it.
    """
    if optimizer not in get_args(OptimizerKind):
        known = ", ".join(get_args(OptimizerKind))
        raise InputError("optimizer", expected=f"one of {known}", got=repr(optimizer), do="name its kind")
    if not (learning_rate >= 0 and math.isfinite(learning_rate)):
        raise InputError("learning_rate", expected="a number ≥ 0", got=str(learning_rate), do="give the step size η")
    if not 0 <= beta1 < 1:
        raise InputError("beta1", expected="a number in [0, 1)", got=str(beta1), do="give the momentum's decay")
    if learning_rate == 0:
        return math.inf
    gain = {"gradient_descent": 2.0, "heavy_ball": 2 + 2 * beta1, "adam": (2 + 2 * beta1) / (1 - beta1)}
    return gain[optimizer] / learning_rate


def _check(
    dimension: int, preconditioner: NDArray[Any] | None, which: str, tolerance: float, num_basis_vectors: int
) -> Array:
    """√D, ones where there is no D; an error where an argument is wrong."""
    if dimension < 1:
        raise InputError("dimension", expected="at least 1 parameter", got=str(dimension), do="count the parameters")
    if which not in get_args(Which):
        raise InputError("which", expected="LA or LM", got=repr(which), do="ask for the largest, or by absolute value")
    if not tolerance >= 0:
        raise InputError("tolerance", expected="a number ≥ 0", got=str(tolerance), do="take 1e-4")
    if num_basis_vectors < 2:
        raise InputError("num_basis_vectors", expected="at least 2", got=str(num_basis_vectors), do="take 20")
    if preconditioner is None:
        return np.ones(dimension)
    diagonal = np.asarray(preconditioner, dtype=np.float64)
    if diagonal.shape != (dimension,) or not (np.isfinite(diagonal) & (diagonal > 0)).all():
        lowest = diagonal.min() if diagonal.size else math.nan
        raise InputError(
            "preconditioner",
            expected=f"positive finite numbers of shape ({dimension},)",
            got=f"shape {diagonal.shape}, smallest {lowest:.3g}",
            do="give the diagonal of D, with the optimiser's ε in it",
        )
    return np.sqrt(diagonal)
