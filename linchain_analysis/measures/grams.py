"""From Gram matrices of a few columns to their coordinates in an orthonormal basis of what they span.

The Gram matrix of an *outer* factor and what belongs to it, in float64, serves as well as a QR decomposition and costs
a fraction of it: the outer factors are well conditioned, and the ill-conditioned product of the chain is formed
afterwards, from the coordinates.
"""

from __future__ import annotations

import numpy as np

from linchain_analysis.measures.spectral import Array

# Of columns brought to length 1: below this a pivot is rounding as much as number, and an eigenvalue is rounding.
_SAFE_PIVOT = 1e-6
_PIECE = 1 << 14  # numbers of a stack worked on at a time
_ROUNDING = 64 * float(np.finfo(np.float64).eps)


def coordinates_from_gram(gram: Array) -> Array:
    """Return R with RᵀR = gram: the columns' coordinates in an orthonormal basis of their span.

    Columns are brought to length 1 first, so that a column keeps its digits beside much longer ones (an update beside
    its factor). By Cholesky's method where that is safe, else from the eigenvectors with those at rounding level left
    out, so that columns that depend on each other leave no noise behind.

    Args:
        gram: (k, c, c) float64, symmetric, positive semidefinite up to rounding.

    Returns:
        (k, c, c); unique up to an orthogonal factor on the left. A zero column stays zero exactly. NaN for a matrix
        that holds NaN or Inf.
    """
    upper = np.empty(gram.shape)
    # In pieces: memory that is not in use already costs more, when it is first touched, than the arithmetic.
    size = max(1, _PIECE // max(gram.shape[-1] ** 2, 1))
    for start in range(0, len(gram), size):
        piece = slice(start, start + size)
        upper[piece] = _coordinates(gram[piece])
    return upper


def _coordinates(gram: Array) -> Array:
    squares = np.einsum("kii->ki", gram)
    if squares.min(initial=1.0) > 0 and np.isfinite(gram).all():  # nothing is out of the ordinary
        length = np.sqrt(squares)
        inverse = 1.0 / length
        unit = inverse[:, :, None] * inverse[:, None, :]
        unit *= gram
        return np.asarray(_decompose(unit) * length[:, None, :])
    finite = np.asarray(np.isfinite(gram).all(axis=(1, 2)))
    present = (squares > 0) & finite[:, None]
    length = np.sqrt(np.where(present, squares, 1.0))
    unit = np.where(present[:, :, None] & present[:, None, :], gram, 0.0)
    unit = unit / length[:, :, None] / length[:, None, :]
    unit += np.eye(gram.shape[-1]) * ~present[:, :, None]
    upper = _decompose(unit) * np.where(present, length, 0.0)[:, None, :]
    upper[~finite] = np.nan
    return upper


def _decompose(unit: Array) -> Array:
    try:
        lower = np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:
        lower = np.stack([_try_cholesky(matrix) for matrix in unit])
    upper = np.array(np.swapaxes(lower, -1, -2))
    unsafe = ~(np.einsum("kii->ki", upper).min(axis=-1, initial=1.0) > _SAFE_PIVOT)
    if unsafe.any():
        values, vectors = np.linalg.eigh(unit[unsafe])
        kept = np.where(values > _ROUNDING * unit.shape[-1], values, 0.0)
        upper[unsafe] = np.sqrt(kept)[:, :, None] * np.swapaxes(vectors, -1, -2)
    return upper


def _try_cholesky(matrix: Array) -> Array:
    try:
        return np.asarray(np.linalg.cholesky(matrix))
    except np.linalg.LinAlgError:
        return np.zeros_like(matrix)
