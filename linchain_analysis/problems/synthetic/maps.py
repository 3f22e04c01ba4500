"""A stack of linear maps to learn, one for each data seed: their loss, its gradient, and the smallest it can be.

The loss of ΔW (d_in, d_out) is L = weight · Σ φ(R), R = D (ΔW − T) − E, with φ(e) = e²/2 (power 2) or e⁴/4 (power 4)
over the observed entries. The rows of D (N, d_in) are the inputs, E (N, d_out) the noise of the labels Y = D T + E. In
place of samples D can be the root of the inputs' covariance, and L with power 2 is then the expectation over all
inputs: ½‖ΔW − T‖² where they are whitened. Written with ΔW − T, small losses keep their digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic.streams import STEPS, open_stream

Floats = NDArray[np.float64]


class Workspace:
    """Arrays by name, used again at every step: to get fresh ones from the system takes longer than to fill them."""

    def __init__(self) -> None:
        self._arrays: dict[str, Floats] = {}

    def empty(self, name: str, shape: tuple[int, ...]) -> Floats:
        """Return the array of this name, in this shape; it holds anything."""
        size = math.prod(shape)
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = np.empty(size)
        return array[:size].reshape(shape)


@dataclass(frozen=True)
class LinearMaps:
    """S maps of one shape.

    Attributes:
        targets: T, (S, d_in, d_out).
        design: D, (S, N, d_in); None for the root of `covariance`.
        noise: E, (S, N, d_out), N = d_in without a `design`; None for exact labels.
        observed: (S, N, d_out), which entries of the residual count; None for all.
        covariance: Eigenvalues (d_in,) of the inputs' covariance, which is diagonal; ones where it is empty.
        weight: Of the sum of φ: 1, or 1/N where D holds samples.
        power: 2 or 4.
        batch_size: Rows of a fresh D that every step draws; None for the same D always.
        label_noise: Standard deviation of the noise of such rows.
        seeds: (S,), of the draws of each step.

    Raises:
        InputError: Shapes that do not belong together.
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

    def __post_init__(self) -> None:
        if self.targets.ndim != 3:
            raise _wrong("targets", "(S, d_in, d_out)", self.targets.shape)
        count, d_in, d_out = self.targets.shape
        num_rows = d_in
        if self.design is not None:
            if self.design.ndim != 3 or self.design.shape[::2] != (count, d_in):
                raise _wrong("design", f"({count}, N, {d_in})", self.design.shape)
            num_rows = self.design.shape[1]
        for name, array in (("noise", self.noise), ("observed", self.observed)):
            if array is not None and array.shape != (count, num_rows, d_out):
                raise _wrong(name, f"({count}, {num_rows}, {d_out})", array.shape)
        if self.covariance.shape not in ((0,), (d_in,)):
            raise _wrong("covariance", f"({d_in},)", self.covariance.shape)
        if self.power not in (2, 4):
            raise InputError("power", expected="2 or 4", got=repr(self.power), do="choose one of them")
        if self.batch_size is not None:
            if not (self.design is None and self.noise is None and self.observed is None):
                raise InputError(
                    "batch_size",
                    expected="fresh rows, whose entries are all observed",
                    got="a design, noise or a choice of entries that stays",
                    do="leave out one of them",
                )
            if len(self.seeds) != count:
                raise _wrong("seeds", f"({count},)", (len(self.seeds),))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.targets.shape[1], self.targets.shape[2]

    def take(self, index: NDArray[np.intp]) -> LinearMaps:
        """Return the maps at these positions, in this order."""
        return replace(
            self,
            targets=self.targets[index],
            design=None if self.design is None else self.design[index],
            noise=None if self.noise is None else self.noise[index],
            observed=None if self.observed is None else self.observed[index],
            seeds=tuple(self.seeds[k] for k in index) if self.seeds else (),
        )

    def at_step(self, step: int) -> LinearMaps:
        """Return what step `step`, counted from 1, is trained on: fresh rows where there is a `batch_size`."""
        if self.batch_size is None:
            return self
        d_in, d_out = self.shape
        designs, noises = [], []
        for seed in self.seeds:
            generator = open_stream(seed, STEPS, step)
            designs.append(generator.standard_normal((self.batch_size, d_in)) * np.sqrt(self._variances))
            noises.append(generator.standard_normal((self.batch_size, d_out)) * self.label_noise)
        noise = np.stack(noises) if self.label_noise else None
        return replace(self, design=np.stack(designs), noise=noise, weight=1 / self.batch_size, batch_size=None)

    def evaluate(self, delta: Floats, index: NDArray[np.intp], work: Workspace | None = None) -> tuple[Floats, Floats]:
        """Return the loss (K,) and G = ∂L/∂ΔW (K, d_in, d_out) of K changes of weight.

        Args:
            delta: ΔW, (K, d_in, d_out).
            index: (K,), the map that each one learns; quickest where the same ones are neighbours.
            work: Arrays to compute in, of which G then is one; fresh ones by default.

        Raises:
            InputError: Every step draws its inputs: there is no loss before one is chosen by `at_step`.
        """
        if self.batch_size is not None:
            raise InputError(
                "loss", expected="the inputs of one step", got="a stream of them", do="call at_step(step) first"
            )
        work = Workspace() if work is None else work
        residual = self._residual(delta, index, work)
        flat = residual.reshape(len(residual), -1)
        if self.power == 2:
            loss, slope = np.einsum("ki,ki->k", flat, flat) / 2, residual
        else:
            squares = np.multiply(flat, flat, out=work.empty("slope", flat.shape))
            loss = np.einsum("ki,ki->k", squares, squares) / 4
            slope = squares.reshape(residual.shape)
            slope *= residual
        if self.weight != 1.0:
            loss *= self.weight
            slope *= self.weight
        if self.design is None:
            gradient = slope
            if not self._whitened:
                gradient *= self._roots[:, None]
        else:
            gradient = work.empty("gradient", delta.shape)
            for chains, k in _runs(index):
                np.matmul(self.design[k].T, slope[chains], out=gradient[chains])
        return loss, gradient

    def losses(self, delta: Floats, index: NDArray[np.intp], work: Workspace | None = None) -> Floats:
        """Return the loss (K,) alone; with fresh rows at every step, its expectation over them.

        An error of such a row is normal with the variance v_j = Σ_i c_i (ΔW − T)_ij² + σ² in output j, so that the
        expectation is Σ_j v_j / 2, or Σ_j 3 v_j² / 4 with power 4.
        """
        if self.batch_size is None:
            return self.evaluate(delta, index, work)[0]
        if self.power == 2:
            return self.population_losses(delta, index, work) + self._step_variance * self.shape[1] / 2
        error = self._errors(delta, index, Workspace() if work is None else work)
        variances = np.einsum("kij,kij->kj", error, error) + self._step_variance
        return np.asarray(0.75 * np.einsum("kj,kj->k", variances, variances))

    def population_losses(self, delta: Floats, index: NDArray[np.intp], work: Workspace | None = None) -> Floats:
        """Return ½ E‖x (ΔW − T)‖² (K,) over inputs of the given covariance, without noise: the error on new inputs."""
        error = self._errors(delta, index, Workspace() if work is None else work)
        flat = error.reshape(len(error), -1)
        return np.asarray(np.einsum("ki,ki->k", flat, flat) / 2)

    @property
    def is_population(self) -> bool:
        """Whether the loss is the population loss itself."""
        exact = self.design is None and self.noise is None and self.observed is None
        return exact and self.power == 2 and self.batch_size is None and self.weight == 1.0

    @cached_property
    def target_losses(self) -> Floats:
        """Population loss of ΔW = 0, ½ E‖x T‖², (S,): what relative losses are relative to."""
        return self.population_losses(np.zeros_like(self.targets), np.arange(len(self)))

    @np.errstate(over="ignore")
    def smallest_losses(self, rank: int) -> Floats:
        """Return the infimum of `losses` over matrices of at most `rank`, (S,); NaN where it is not known.

        Quadratic losses with every entry observed: the labels' part outside the reach of the inputs, and of the part
        inside the singular values beyond `rank` (Eckart & Young 1936; reduced-rank regression, Izenman 1975). Any
        other loss: what it is where no residual is left but the noise of fresh rows, if such a matrix has at most
        `rank`; otherwise unknown.

        Directions in which the inputs are below rounding (max(N, d_in) · eps of the largest) count as out of reach.
        Inf where it overflows.
        """
        sigma, outside = self._label_spectra
        beyond = (sigma[:, rank:] ** 2).sum(axis=-1) + outside
        variance = self._step_variance if self.batch_size is not None else 0.0
        if self.power == 2 and self.observed is None:
            return np.asarray(self.weight * beyond / 2 + variance * self.shape[1] / 2)
        least = 3 * (variance * variance) * self.shape[1] / 4 if self.power == 4 else 0.0
        return np.where(beyond == 0, least, np.nan)

    @cached_property
    def _label_spectra(self) -> tuple[Floats, Floats]:
        """Singular values (S, q) of the labels' part within reach of the inputs, and the square (S,) of the rest."""
        if self.design is None:
            design, u, sigma = np.diag(self._roots)[None], np.eye(self.shape[0])[None], self._roots[None]
        else:
            design = self.design
            u, sigma, _ = np.linalg.svd(design, full_matrices=False)
        eps = np.finfo(np.float64).eps
        within = sigma > max(design.shape[1:]) * eps * sigma.max(axis=-1, keepdims=True, initial=0.0)
        basis = u * within[:, None, :]  # zero columns add nothing
        reached = basis.swapaxes(1, 2) @ (design @ self.targets)
        outside = np.zeros(len(self))
        if self.noise is not None:
            inside = basis.swapaxes(1, 2) @ self.noise
            reached = reached + inside
            left = ((self.noise - basis @ inside) ** 2).sum(axis=(1, 2))
            outside = np.where(within.sum(axis=-1) == design.shape[1], 0.0, left)
        values = np.linalg.svd(reached, compute_uv=False)
        # Rounding of a matrix that has no more than a few singular values is no tail.
        floor = max(design.shape[1], *self.shape) * eps * values.max(axis=-1, keepdims=True, initial=0.0)
        return np.where(values > floor, values, 0.0), outside

    @property
    def _step_variance(self) -> float:
        """Variance of the labels' noise in fresh rows."""
        return self.label_noise * self.label_noise  # where a power raises OverflowError, a product is Inf

    @cached_property
    def _whitened(self) -> bool:
        return not len(self.covariance) or bool((self.covariance == 1.0).all())

    @property
    def _variances(self) -> Floats:
        return self.covariance if len(self.covariance) else np.ones(self.shape[0])

    @cached_property
    def _roots(self) -> Floats:
        return np.asarray(np.sqrt(self._variances))

    def _errors(self, delta: Floats, index: NDArray[np.intp], work: Workspace) -> Floats:
        """ΔW − T, times the root of the covariance."""
        error = work.empty("error", delta.shape)
        for chains, k in _runs(index):
            np.subtract(delta[chains], self.targets[k], out=error[chains])
        if not self._whitened:
            error *= self._roots[:, None]
        return error

    def _residual(self, delta: Floats, index: NDArray[np.intp], work: Workspace) -> Floats:
        if self.design is None:
            residual = self._errors(delta, index, work)
        else:
            error = work.empty("error", delta.shape)
            residual = work.empty("residual", (len(delta), self.design.shape[1], delta.shape[2]))
            for chains, k in _runs(index):
                np.subtract(delta[chains], self.targets[k], out=error[chains])
                np.matmul(self.design[k], error[chains], out=residual[chains])
        for chains, k in _runs(index):
            if self.noise is not None:
                residual[chains] -= self.noise[k]
            if self.observed is not None:
                residual[chains] *= self.observed[k]
        return residual


def _runs(index: NDArray[np.intp]) -> Iterator[tuple[slice, int]]:
    """Neighbours of the same map, and which it is."""
    ends = [*(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
    start = 0
    for end in ends:
        if end > start:
            yield slice(start, end), int(index[start])
        start = end


def _wrong(place: str, expected: str, shape: tuple[int, ...]) -> InputError:
    return InputError(place, expected=f"the shape {expected}", got=f"{shape}", do="give an array of that shape")
