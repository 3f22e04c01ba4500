"""Reduce tall factors to small triangular ones on their device: the part of a spectrum that costs anything.

A spectrum of A W1 … Wn B needs only R of A = QR and of Bᵀ = QR, in float64. CPUs take it by Householder's method.
Accelerators loop over the matrices of a batched QR, so there R comes from the Cholesky factor of the Gram matrix, taken
twice: the first pass makes the rows nearly orthonormal, the second makes good what the squaring of the condition
number lost (Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015, CholeskyQR2). Matrices whose Gram matrix is not positive
definite to rounding (a factor at zero, an update that is a multiple of the factor) go to Householder there too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def triangular_factor(rows: Tensor) -> Tensor:
    """Return R of the QR decomposition of each rowsᵀ.

    Args:
        rows: (k, w, d) float64: the columns of the decomposed matrices (d, w) as rows, which is how `nn.Linear` keeps
            them.

    Returns:
        (k, min(d, w), w) with RᵀR = rows rowsᵀ; not unique in sign. NaN where rows hold NaN or Inf.
    """
    _, w, d = rows.shape
    if d < w or rows.device.type == "cpu":
        return _householder(rows)
    return _cholesky_twice(rows)


def _cholesky_twice(rows: Tensor) -> Tensor:
    # Rows are brought to length 1 first: Cholesky then loses nothing to blocks of different size, such as a factor
    # beside its update.
    length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)  # (k, w, 1)
    length = torch.where(length > 0, length, torch.ones_like(length))
    unit = rows / length
    first, failed = torch.linalg.cholesky_ex(unit @ unit.mT)  # (k, w, w) lower
    orthonormal = torch.linalg.solve_triangular(first, unit, upper=False)
    second, failed_again = torch.linalg.cholesky_ex(orthonormal @ orthonormal.mT)
    # The second pass is accurate only where the first left something close to the identity: cond² eps ≪ 1.
    pivot = first.diagonal(dim1=1, dim2=2).amin(dim=1)
    unsafe = (failed != 0) | (failed_again != 0) | ~(pivot > 1e-7)
    lower = length * (first @ second)
    factor: Tensor = lower.mT.contiguous()
    if bool(unsafe.any()):
        factor[unsafe] = _householder(rows[unsafe])
    return factor


def _householder(rows: Tensor) -> Tensor:
    finite = rows.isfinite().flatten(1).all(dim=1)  # LAPACK's answer to NaN is undefined
    r: Tensor = torch.linalg.qr(torch.where(finite[:, None, None], rows, 0.0).mT, mode="r").R
    r[~finite] = torch.nan
    return r
