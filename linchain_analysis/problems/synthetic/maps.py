"""A stack of linear maps to learn, one for each data seed: their loss, its gradient, and the smallest it can be.

The loss of ΔW (d_in, d_out) is L = weight · Σ φ(R), R = D (ΔW − T) − E, with φ(e) = e²/2 (power 2) or e⁴/4 (power 4)
over the observed entries. The rows of D (N, d_in) are the inputs, E (N, d_out) the noise of the labels D T + E. Without
D the inputs are whitened and R = ΔW − T − E. Written with ΔW − T, small losses keep their digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearMaps:
    """S maps of one shape.

    Attributes:
        targets: T, (S, d_in, d_out).
        design: D, (S, N, d_in); None for whitened inputs.
        noise: E, (S, N, d_out); None for exact labels.
        observed: (S, N, d_out), which entries of the residual count; None for all.
        covariance: Eigenvalues (d_in,) of the inputs' covariance, which is diagonal.
        weight: Of the sum of φ: 1, or 1/N where D holds samples.
        power: 2 or 4.
        batch_size: Rows of a fresh D that every step draws; None for the same D always.
        label_noise: Standard deviation of the noise of such rows.
        seeds: (S,), of the draws of each step.
    """

    targets: Floats
    design: Floats | None = None
    noise: Floats | None = None
    observed: NDArray[np.bool_] | None = None
    covariance: Floats = field(default_factory=lambda: np.ones(0))
    weight: float = 1.0
    power: int = 2
    batch_size: int | None = None
    label_noise: float = 0.0
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.targets.shape[1], self.targets.shape[2]

    def at_step(self, step: int) -> LinearMaps:
        """Return what step `step`, counted from 1, is trained on: fresh rows where there is a `batch_size`."""
        if self.batch_size is None:
            return self
        d_in, d_out = self.shape
        designs, noises = [], []
        for seed in self.seeds:
            generator = np.random.default_rng([seed, step])
            designs.append(generator.standard_normal((self.batch_size, d_in)) * np.sqrt(self.covariance))
            noises.append(generator.standard_normal((self.batch_size, d_out)) * self.label_noise)
        noise = np.stack(noises) if self.label_noise else None
        return replace(self, design=np.stack(designs), noise=noise, weight=1 / self.batch_size, batch_size=None)

    def evaluate(self, delta: Floats, index: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Return the loss (K,) and G = ∂L/∂ΔW (K, d_in, d_out) of K changes of weight.

        Args:
            delta: ΔW, (K, d_in, d_out).
            index: (K,), the map that each one learns.
        """
        residual = self._residual(delta, index)
        flat = residual.reshape(len(residual), -1)
        if self.power == 2:
            loss, slope = np.einsum("ki,ki->k", flat, flat) / 2, residual
        else:
            squares = flat * flat
            loss, slope = np.einsum("ki,ki->k", squares, squares) / 4, residual * residual * residual
        gradient = slope if self.design is None else self.design[index].swapaxes(1, 2) @ slope
        if self.weight != 1.0:
            loss, gradient = self.weight * loss, self.weight * gradient
        return loss, gradient

    def losses(self, delta: Floats, index: NDArray[np.intp]) -> Floats:
        """Return the loss (K,) alone; with fresh rows at every step, its expectation over them."""
        if self.batch_size is not None:
            floor = self.label_noise**2 * self.shape[1] / 2
            return self.population_losses(delta, index) + floor
        return self.evaluate(delta, index)[0]

    def population_losses(self, delta: Floats, index: NDArray[np.intp]) -> Floats:
        """Return ½ E‖x (ΔW − T)‖² (K,) over inputs of the given covariance, without noise: the error on new inputs."""
        error = delta - self.targets[index]
        return np.asarray(np.einsum("kij,kij,i->k", error, error, self._variances) / 2)

    @cached_property
    def target_losses(self) -> Floats:
        """Population loss of ΔW = 0, ½ E‖x T‖², (S,): what relative losses are relative to."""
        return self.population_losses(np.zeros_like(self.targets), np.arange(len(self)))

    def smallest_losses(self, rank: int) -> Floats:
        """Return the infimum of `losses` over matrices of at most `rank`, (S,); NaN where it is not known.

        Quadratic losses with every entry observed: the labels' part outside the reach of the inputs, and of the part
        inside the singular values beyond `rank` (Eckart & Young 1936; reduced-rank regression, Izenman 1975). Any other
        loss: 0 where the labels are exact and some T is within reach, otherwise unknown.
        """
        if self.batch_size is not None:
            scaled = np.sqrt(self._variances)[:, None] * self.targets
            return np.asarray(self._tails(scaled, rank) / 2 + self.label_noise**2 * self.shape[1] / 2)
        if self.power == 2 and self.observed is None:
            return np.array([self._smallest_quadratic(k, rank) for k in range(len(self))])
        # The rank of T, not of what the observed entries would allow.
        within = np.linalg.matrix_rank(self.targets) <= rank
        return np.where(within, 0.0, np.nan) if self.noise is None else np.full(len(self), np.nan)

    def _smallest_quadratic(self, k: int, rank: int) -> float:
        noise = None if self.noise is None else self.noise[k]
        if self.design is None:
            labels = self.targets[k] if noise is None else self.targets[k] + noise
            return float(self.weight * self._tails(labels[None], rank)[0] / 2)
        design = self.design[k]
        u, sigma, _ = np.linalg.svd(design, full_matrices=False)
        basis = u[:, sigma > max(design.shape) * np.finfo(np.float64).eps * sigma.max(initial=0.0)]
        seen = basis.T @ (design @ self.targets[k])
        outside = 0.0
        if noise is not None:
            inside = basis.T @ noise
            seen = seen + inside
            outside = float(((noise - basis @ inside) ** 2).sum())
        return float(self.weight * (self._tails(seen[None], rank)[0] + outside) / 2)

    @staticmethod
    def _tails(matrices: Floats, rank: int) -> Floats:
        """Sum of σ² beyond the first `rank`; rounding of a matrix that has no more than these is no tail."""
        sigma = np.linalg.svd(matrices, compute_uv=False)
        top = sigma.max(axis=-1, keepdims=True, initial=0.0)
        noise_floor = max(matrices.shape[-2:]) * np.finfo(np.float64).eps * top
        sigma = np.where(sigma > noise_floor, sigma, 0.0)
        return np.asarray((sigma[..., rank:] ** 2).sum(axis=-1))

    @property
    def _variances(self) -> Floats:
        return self.covariance if len(self.covariance) else np.ones(self.shape[0])

    def _residual(self, delta: Floats, index: NDArray[np.intp]) -> Floats:
        residual = delta - self.targets[index]
        if self.design is not None:
            residual = self.design[index] @ residual
        if self.noise is not None:
            residual -= self.noise[index]
        if self.observed is not None:
            residual *= self.observed[index]
        return residual
