"""Chains in full size, the dense twin of `measures.cores.Cores`, and their reduction to small coordinates by QR."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from linchain_analysis.measures.cores import Cores, TokenParts

Array = NDArray[np.float64]
Shape = tuple[int, tuple[int, ...], int]

# d_in, widths and d_out: n = 0 … 4, d_in below and above d_out, a wide and a narrow middle, d smaller than r.
SHAPES: dict[str, Shape] = {
    "n=0": (12, (4,), 9),
    "n=1": (9, (4, 4), 12),
    "n=2": (11, (3, 3, 3), 8),
    "n=3": (7, (3, 3, 3, 3), 14),
    "n=4": (11, (2, 2, 2, 2, 2), 10),
    "8-16-8": (12, (8, 16, 8), 11),
    "4-2-4": (10, (4, 2, 4), 9),
    "n=0, d_in < r": (3, (5,), 9),
    "n=1, both < r": (3, (5, 5), 4),
}
every_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


@dataclass(frozen=True)
class FullChain:
    """One chain around one step; every list has a matrix per factor, (d_in, w_0), (w_{i-1}, w_i), (w_n, d_out)."""

    before: list[Array]
    change: list[Array]
    gradient: list[Array]
    scale: float = 1.0
    start: list[Array] | None = None
    start_scale: float = 1.0

    @property
    def after(self) -> list[Array]:
        return [old + step for old, step in zip(self.before, self.change, strict=True)]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.before[0]), self.before[-1].shape[1]

    @property
    def update(self) -> Array:
        return self.scale * (product(self.after) - product(self.before))

    @property
    def delta(self) -> Array:
        now = self.scale * product(self.after)
        return now if self.start is None else now - self.start_scale * product(self.start)


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns (d_in, p) and (d_out, q) in which a chain was written."""

    left: Array
    right: Array

    def lift(self, core: Array) -> Array:
        """Return the full matrix of a core."""
        return self.left @ core @ self.right.T

    def reduce(self, full: Array) -> Array:
        """Return the core of a full matrix."""
        return self.left.T @ full @ self.right


def product(factors: Sequence[Array]) -> Array:
    return reduce(np.matmul, factors)


def sides(factors: Sequence[Array]) -> list[tuple[Array, Array]]:
    """L_i and R_i of each factor, with identities at the ends."""
    d_in, d_out = len(factors[0]), factors[-1].shape[1]
    return [
        (product([np.eye(d_in), *factors[:i]]), product([*factors[i + 1 :], np.eye(d_out)]))
        for i in range(len(factors))
    ]


def preconditioned(factors: Sequence[Array], gradient: Array) -> Array:
    """P(G) = Σ L_i L_iᵀ G R_iᵀ R_i, dense."""
    return sum(left @ left.T @ gradient @ right.T @ right for left, right in sides(factors))


def factor_gradients(factors: Sequence[Array], gradient: Array, scale: float) -> list[Array]:
    """g_i = scale · L_iᵀ G R_iᵀ, from the gradient of the full weight."""
    return [scale * left.T @ gradient @ right.T for left, right in sides(factors)]


def tangent_projection(factors: Sequence[Array], gradient: Array) -> Array:
    """Orthogonal projection of G on the span of all L_i E R_i, E a matrix unit."""
    moves = np.hstack([np.kron(left, right.T) for left, right in sides(factors)])  # row-major vec
    u, sigma, _ = np.linalg.svd(moves, full_matrices=False)
    span = u[:, sigma > 1e-12 * sigma[0]]
    return (span @ (span.T @ gradient.ravel())).reshape(gradient.shape)


def random_chain(
    rng: np.random.Generator, shape: Shape, *, step: float = 0.1, scale: float = 2.0, moved: float | None = None
) -> FullChain:
    """Return a chain of Gaussian factors of about unit gain; with `moved`, one that started elsewhere."""
    d_in, widths, d_out = shape
    sizes = list(itertools.pairwise((d_in, *widths, d_out)))

    def draw() -> list[Array]:
        return [rng.standard_normal(pair) / np.sqrt(min(pair)) for pair in sizes]

    before = draw()
    start = None if moved is None else [f + moved * far for f, far in zip(before, draw(), strict=True)]
    return FullChain(before, [step * change for change in draw()], draw(), scale, start, 1.5)


def small_cores(chains: Sequence[FullChain], **known: Any) -> tuple[Cores, list[Basis]]:
    """Write chains of one shape in orthonormal bases of their outer factors and what belongs to those."""
    bases, rows = [], []
    for chain in chains:
        moved = [] if chain.start is None else [[f - s for f, s in zip(chain.before, chain.start, strict=True)]]
        parts = [chain.before, chain.change, chain.gradient, *moved]
        basis = Basis(
            np.linalg.qr(np.hstack([part[0] for part in parts]))[0],
            np.linalg.qr(np.vstack([part[-1] for part in parts]).T)[0],
        )
        bases.append(basis)
        rows.append([[basis.left.T @ part[0], *part[1:-1], part[-1] @ basis.right] for part in parts])
    before, change, gradient, *moved = [
        tuple(np.stack([row[part][i] for row in rows]) for i in range(len(chains[0].before)))
        for part in range(len(rows[0]))
    ]
    cores = Cores(
        scale=np.array([chain.scale for chain in chains]),
        before=before,
        change=change,
        gradient=gradient,
        start=tuple(old - change for old, change in zip(before, moved[0], strict=True)) if moved else None,
        since_start=tuple(m + step for m, step in zip(moved[0], change, strict=True)) if moved else None,
        start_scale=np.array([chain.start_scale for chain in chains]) if moved else None,
        size=chains[0].size,
    )
    return replace(cores, **known), bases


def start_squares(starts: Sequence[Sequence[Array]]) -> tuple[tuple[Array, Array], ...]:
    """F_iᵀF_i and F_{i+1}F_{i+1}ᵀ of each pair of neighbours, stacked over chains."""
    return tuple(
        (np.stack([s[i].T @ s[i] for s in starts]), np.stack([s[i + 1] @ s[i + 1].T for s in starts]))
        for i in range(len(starts[0]) - 1)
    )


def token_parts(chains: Sequence[FullChain], inputs: Sequence[Array], output_gradients: Sequence[Array]) -> TokenParts:
    """Return what X (tokens, d_in) and D (tokens, d_out) of each chain show, from G = XᵀD itself."""
    full = [x.T @ d for x, d in zip(inputs, output_gradients, strict=True)]
    steps = [preconditioned(chain.before, g) for chain, g in zip(chains, full, strict=True)]
    tangents = [tangent_projection(chain.before, g) for chain, g in zip(chains, full, strict=True)]
    return TokenParts(
        gradient_square=np.array([(g**2).sum() for g in full]),
        tangent_square=np.array([(t**2).sum() for t in tangents]),
        preconditioned_dot=np.array([(g * step).sum() for g, step in zip(full, steps, strict=True)]),
        preconditioned_square=np.array([(step**2).sum() for step in steps]),
        num_tokens=np.array([float(len(x)) for x in inputs]),
        inputs=np.stack(
            [np.linalg.qr(x @ chain.before[0])[1] for chain, x in zip(chains, inputs, strict=True)],
        ),
    )


def complete_cores(chains: Sequence[FullChain], seed: int = 0) -> Cores:
    """Return cores with everything that any measure asks for; what is not in the chains is drawn from `seed`."""
    rng = np.random.default_rng(seed)
    d_in, d_out = chains[0].size
    k, m = len(chains), len(chains[0].before)
    tokens = [(rng.standard_normal((30, d_in)), rng.standard_normal((30, d_out))) for _ in chains]
    starts = [chain.before if chain.start is None else chain.start for chain in chains]
    cores, _ = small_cores(
        chains,
        tokens=token_parts(chains, *zip(*tokens, strict=True)),
        start_squares=start_squares(starts),
        learning_rate=np.tile(10.0 ** rng.uniform(-1, 1, m), (k, 1)),
        base_norm=np.full(k, 3.0),
    )
    return cores


def change_gauge(chain: FullChain, gauges: Sequence[Array]) -> FullChain:
    """Return F_i → M_{i-1}⁻¹ F_i M_i for M_i (w_i, w_i), identities at the ends: the same function."""
    d_in, d_out = chain.size
    into = [np.eye(d_in), *gauges]
    out = [*gauges, np.eye(d_out)]

    def turn(matrices: Sequence[Array]) -> list[Array]:
        return [np.linalg.solve(a, f) @ b for a, f, b in zip(into, matrices, out, strict=True)]

    # ∂L/∂F' of the same loss: g' = M_{i-1}ᵀ g M_i⁻ᵀ.
    gradient = [a.T @ g @ np.linalg.inv(b).T for a, g, b in zip(into, chain.gradient, out, strict=True)]
    start = None if chain.start is None else turn(chain.start)
    return replace(chain, before=turn(chain.before), change=turn(chain.change), gradient=gradient, start=start)
