"""Chains around one optimiser step in small coordinates: what every measure of factors, updates and gradients takes.

The columns of A before the step, of its update, of its gradient, … span a small space. In an orthonormal basis Q_a of
it, and in one, Q_b, of the rows of B and what belongs to B, a chain of any size is a chain of a few dozen rows and
columns:

    A W1 … Wn B = Q_a (A~ W1 … Wn B~) Q_bᵀ

so products, singular values, norms and inner products of anything built from factors, updates and gradients are those
of the small chain. Singular vectors of delta are Q_a, Q_b times those of the small one.

Legend: k chains of one shape; m = n + 2 factors F_0 = A~ (k, p, w_0), F_i = W_i (k, w_{i-1}, w_i), F_{m-1} = B~
(k, w_n, q); L_i = F_0 … F_{i-1} and R_i = F_{i+1} … F_{m-1}, the products on both sides of factor i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.spectral import Array

Factors = tuple[Array, ...]


@dataclass(frozen=True)
class TokenParts:
    """What one backward pass showed of the full gradient G = Xᵀ D (d_in, d_out) of each weight, per chain (k,).

    X (tokens, d_in) are the layer's inputs, D (tokens, d_out) the gradients of the loss with respect to its outputs.

    Attributes:
        gradient_square: ‖G‖².
        tangent_square: ‖Π_T G‖², T the tangent space of the chain at its factors.
        preconditioned_dot: ⟨G, P(G)⟩, P the effective preconditioner.
        preconditioned_square: ‖P(G)‖².
        num_tokens: Rows of X.
        inputs: (k, w_0, w_0) with ‖X A v‖ = ‖inputs v‖ for every v, A before the step.
    """

    gradient_square: Array
    tangent_square: Array
    preconditioned_dot: Array
    preconditioned_square: Array
    num_tokens: Array
    inputs: Array


@dataclass(frozen=True)
class Cores:
    """k chains of one shape around one step.

    Attributes:
        scale: (k,), what multiplies the product now.
        before: The factors as they were before the step.
        change: After the step minus before.
        gradient: ∂L/∂F_i of the whole step (after accumulation, unscaled, before clipping), NaN for a factor without
            one; None where no measure asked for it.
        start: The factors when training began, where their product was not zero then; None elsewhere. They and
            `since_start` are in small coordinates of their own.
        since_start: Their change since, the step included.
        start_scale: (k,), the scale at that time.
        start_squares: Per pair of neighbouring factors, F_iᵀF_i and F_{i+1}F_{i+1}ᵀ when training began, each
            (k, w_i, w_i); empty where no measure asked for them.
        learning_rate: (k, m), of each factor's parameter group; NaN where it is in none.
        size: d_in and d_out.
        trained: (k, m), which factors train; None where all do.
        epsilon: Machine epsilon of the dtype that the factors are stored in.
        base_norm: (k,), ‖W_0‖ of the frozen weight; NaN where it was not asked for or cannot be read.
        ends: R of A and of Bᵀ after the step alone, (k, w_0, w_0) and (k, w_n, w_n), where they are at hand.
        tokens: Where activations were looked at in this step.
    """

    scale: Array
    before: Factors
    change: Factors
    size: tuple[int, int]
    gradient: Factors | None = None
    start: Factors | None = None
    since_start: Factors | None = None
    start_scale: Array | None = None
    start_squares: tuple[tuple[Array, Array], ...] = ()
    learning_rate: Array | None = None
    trained: NDArray[np.bool_] | None = None
    epsilon: float = float(np.finfo(np.float32).eps)
    base_norm: Array | None = None
    ends: tuple[Array, Array] | None = None
    tokens: TokenParts | None = None

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def num_factors(self) -> int:
        """m = n + 2."""
        return len(self.before)

    @property
    def dims(self) -> tuple[int, ...]:
        """d_in, w_0, …, w_n, d_out: factor i of the full chain has dims[i] rows and dims[i + 1] columns."""
        return (self.size[0], *(factor.shape[2] for factor in self.before[:-1]), self.size[1])

    @cached_property
    def after(self) -> Factors:
        """The factors after the step."""
        return tuple(old + change for old, change in zip(self.before, self.change, strict=True))

    @cached_property
    def update(self) -> Array:
        """Core of the update of delta, (k, p, q), scale included."""
        return self.scale[:, None, None] * telescope(self.before, self.change)

    @cached_property
    def short_delta(self) -> Array:
        """A smaller core of delta where there is one: the same singular values, in bases of its own."""
        if self.ends is None or self.since_start is not None:
            return self.delta
        left, right = self.ends
        return self.scale[:, None, None] * multiply((left, *self.after[1:-1], np.swapaxes(right, -1, -2)))

    @cached_property
    def delta(self) -> Array:
        """Core of delta after the step, scale included: (k, p, q), or of another size where there is a `start`."""
        scale = self.scale[:, None, None]
        if self.start is None or self.since_start is None:
            return scale * multiply(self.after)
        start_scale = scale if self.start_scale is None else self.start_scale[:, None, None]
        start, change = list(self.start), list(self.since_start)
        # Each with the scale of its time, which may have been changed in between.
        change[-1] = (scale - start_scale) * start[-1] + scale * change[-1]
        start[-1] = start_scale * start[-1]
        return telescope(start, change)


# A diverged module holds Inf and NaN: its numbers become NaN, which says it, and no warning has to say it again.
_quiet = np.errstate(over="ignore", invalid="ignore")


@_quiet
def multiply(factors: Sequence[Array]) -> Array:
    """Return F_0 F_1 … F_{m-1}, (k, p, q)."""
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    return np.asarray(product)


@_quiet
def telescope(before: Sequence[Array], change: Sequence[Array]) -> Array:
    """Return ∏(F_i + dF_i) − ∏F_i, (k, p, q), without subtracting the two products.

    With P_i = F_0 … F_i, dP_i = dP_{i-1} (F_i + dF_i) + P_{i-1} dF_i: every term holds an update, so that a small step
    keeps its digits, of which the difference of the products would lose all.
    """
    product, moved = before[0], change[0]
    for factor, step in zip(before[1:], change[1:], strict=True):
        product, moved = product @ factor, moved @ (factor + step) + product @ step
    return np.asarray(moved)


def prefixes(factors: Sequence[Array]) -> list[Array | None]:
    """Return L_0 … L_{m-1}; L_0 is None, the identity."""
    found: list[Array | None] = [None]
    for factor in factors[:-1]:
        found.append(factor if found[-1] is None else found[-1] @ factor)
    return found


def suffixes(factors: Sequence[Array]) -> list[Array | None]:
    """Return R_0 … R_{m-1}; R_{m-1} is None, the identity."""
    found: list[Array | None] = [None]
    for factor in reversed(factors[1:]):
        found.append(factor if found[-1] is None else factor @ found[-1])
    return found[::-1]


def between(left: Array | None, middle: Array, right: Array | None) -> Array:
    """Return L M R, where None is the identity."""
    product = middle if left is None else left @ middle
    return product if right is None else product @ right


def first_order_terms(factors: Sequence[Array], directions: Sequence[Array]) -> list[Array]:
    """Return L_i D_i R_i for each factor i: the part of a step of the product that is linear in D, each (k, p, q)."""
    return [
        between(left, direction, right)
        for left, direction, right in zip(prefixes(factors), directions, suffixes(factors), strict=True)
    ]


def trained_gradients(cores: Cores) -> list[Array] | None:
    """Return ∂L/∂F_i of each factor, 0 for one that has none or does not train; None where they were not recorded."""
    if cores.gradient is None:
        return None
    gradients = []
    for i, gradient in enumerate(cores.gradient):
        absent = np.asarray(np.isnan(gradient).all(axis=(1, 2)))
        if cores.trained is not None:
            absent = absent | ~cores.trained[:, i]
        gradients.append(np.where(absent[:, None, None], 0.0, gradient))
    return gradients


def inner_product(a: Array, b: Array) -> Array:
    """⟨a, b⟩ = Σ a_ij b_ij of each pair of a stack, (k,)."""
    return np.asarray(np.einsum("...ij,...ij->...", a, b))


@_quiet
def norm(matrix: Array) -> Array:
    """Frobenius norm of each matrix of a stack, without overflow or underflow on the way."""
    top = np.abs(matrix).max(axis=(-2, -1), keepdims=True, initial=0.0)
    safe = np.where((top > 0) & np.isfinite(top), top, 1.0)
    return np.asarray(safe[..., 0, 0] * np.sqrt(np.sum((matrix / safe) ** 2, axis=(-2, -1))))


def ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, NaN where bottom is 0 or either is not finite, Inf where the quotient is too large a number."""
    top, bottom = np.broadcast_arrays(np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64))
    usable = np.isfinite(top) & np.isfinite(bottom) & (bottom != 0)
    with np.errstate(over="ignore"):
        return np.asarray(np.divide(top, bottom, out=np.full(top.shape, np.nan), where=usable))


def cosine(a: Array, b: Array) -> Array:
    """Cosine of the angle between each pair of matrices of a stack; NaN where one is zero or not finite."""
    norm_a, norm_b = norm(a), norm(b)
    unit_a = a / np.where((norm_a > 0) & np.isfinite(norm_a), norm_a, np.nan)[..., None, None]
    unit_b = b / np.where((norm_b > 0) & np.isfinite(norm_b), norm_b, np.nan)[..., None, None]
    return inner_product(unit_a, unit_b)
