"""What kind of map is learned, as data; a data seed makes one map of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic.checking import require_choice, require_number, require_whole
from linchain_analysis.problems.synthetic.maps import LinearMaps
from linchain_analysis.problems.synthetic.streams import INPUTS, NOISE, OBSERVED, TARGET, open_stream
from linchain_analysis.problems.synthetic.targets import BLOCKS, draw_block_target, draw_spectrum_target

Floats = NDArray[np.float64]
Loss = Literal["quadratic", "quartic"]
MAP_NAMES = (*BLOCKS, "spectrum")
_Kind = TypeVar("_Kind", bound=np.generic)


@dataclass(frozen=True)
class MapSetting:
    """One kind of linear map.

    Attributes:
        name: One of `MAP_NAMES`.
        dim: d_in, and d_out unless that is said.
        dim_out: d_out.
        target_rank: Rank of the target, cut to min(d_in, d_out); 0 for the target 0.
        spectrum: Singular values of the target called `spectrum`, kept in descending order; the number 1, `target_rank`
            times, unless told.
        input_decay: The inputs' covariance has the eigenvalues i^(−input_decay); 0 for whitened inputs.
        num_samples: Number of training inputs; None for the expectation over all inputs.
        batch_size: Number of fresh inputs drawn at every step, in place of `num_samples`.
        label_noise: Standard deviation of the noise in the labels.
        observed: Share of the labels' entries that the loss sees; 1 for all. With the expectation over whitened inputs
            these are the entries of the target, and a share below 1 is matrix completion.
        loss: `quadratic` or `quartic`.

    Raises:
        InputError: A value outside its range, or two that exclude each other.
    """

    name: str = "shear-rotation"
    dim: int = 64
    dim_out: int | None = None
    target_rank: int = 8
    spectrum: tuple[float, ...] | None = None
    input_decay: float = 0.0
    num_samples: int | None = None
    batch_size: int | None = None
    label_noise: float = 0.0
    observed: float = 1.0
    loss: Loss = "quadratic"

    def __post_init__(self) -> None:
        require_choice("problem", self.name, MAP_NAMES)
        require_choice("loss", self.loss, get_args(Loss))
        require_whole("dim", self.dim, least=1)
        for place, number in (
            ("dim_out", self.dim_out),
            ("num_samples", self.num_samples),
            ("batch_size", self.batch_size),
        ):
            if number is not None:
                require_whole(place, number, least=1)
        require_whole("target_rank", self.target_rank, least=0)
        require_number("input_decay", self.input_decay)
        require_number("label_noise", self.label_noise)
        require_number("observed", self.observed, above=0.0, most=1.0)
        if self.batch_size is not None and self.num_samples is not None:
            raise InputError(
                "batch_size",
                expected="fresh inputs at every step or a number of inputs that stay",
                got=f"batch_size {self.batch_size} and num_samples {self.num_samples}",
                do="leave out one of them",
            )
        if self.batch_size is not None and self.observed < 1:
            raise InputError(
                "observed",
                expected="1 where every step draws fresh inputs",
                got=repr(self.observed),
                do="leave out observed or batch_size",
            )
        if self.spectrum is not None:
            object.__setattr__(self, "spectrum", self._check_spectrum(self.spectrum))

    def _check_spectrum(self, spectrum: Iterable[float]) -> tuple[float, ...]:
        if self.name != "spectrum":
            raise InputError(
                "spectrum",
                expected=f"none with the target {self.name!r}, which has singular values of its own",
                got=repr(spectrum),
                do="leave it out, or learn the target 'spectrum'",
            )
        sigma = tuple(spectrum)
        for value in sigma:
            require_number("spectrum", value)
        if len(sigma) > min(self.shape):
            raise InputError(
                "spectrum",
                expected=f"at most {min(self.shape)} singular values for a target {self.shape}",
                got=f"{len(sigma)}",
                do="give fewer, or a larger dim",
            )
        return tuple(sorted(map(float, sigma), reverse=True))

    @property
    def shape(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.dim, self.dim if self.dim_out is None else self.dim_out

    def draw(self, data_seeds: Sequence[int]) -> LinearMaps:
        """Return one map for each data seed: target, inputs and noise are drawn from it, and nothing else is.

        Raises:
            InputError: No seed, or one that is no whole number of at least 0.
        """
        if not len(data_seeds):
            raise InputError("data_seeds", expected="one seed at least", got="none", do="give seeds")
        for seed in data_seeds:
            require_whole("data_seeds", seed, least=0)
        samples = [self._draw_samples(seed) for seed in data_seeds]
        return LinearMaps(
            targets=np.stack([self._draw_target(open_stream(seed, TARGET)) for seed in data_seeds]),
            design=_stack([sample[0] for sample in samples]),
            noise=_stack([sample[1] for sample in samples]),
            observed=_stack([sample[2] for sample in samples]),
            covariance=self._variances,
            weight=1 / self.num_samples if self.num_samples else 1.0,
            power=2 if self.loss == "quadratic" else 4,
            batch_size=self.batch_size,
            label_noise=self.label_noise,
            seeds=tuple(int(seed) for seed in data_seeds),
        )

    @property
    def _variances(self) -> Floats:
        return np.asarray(np.arange(1, self.dim + 1.0) ** -self.input_decay)

    def _draw_target(self, generator: np.random.Generator) -> Floats:
        rank = min(self.target_rank, *self.shape)
        if self.name != "spectrum":
            return draw_block_target(self.name, self.shape, rank, generator)
        sigma = np.ones(rank) if self.spectrum is None else np.array(self.spectrum, dtype=np.float64)
        return draw_spectrum_target(sigma, self.shape, generator)

    def _draw_samples(self, seed: int) -> tuple[Floats | None, Floats | None, NDArray[np.bool_] | None]:
        """Return design, noise and observed entries of one map."""
        design = noise = observed = None
        shape = (self.num_samples or self.dim, self.shape[1])
        if self.num_samples:
            design = open_stream(seed, INPUTS).standard_normal((self.num_samples, self.dim)) * np.sqrt(self._variances)
        if self.label_noise and self.batch_size is None:
            noise = self.label_noise * open_stream(seed, NOISE).standard_normal(shape)
        if self.observed < 1:
            count = max(1, round(self.observed * shape[0] * shape[1]))
            flat = np.zeros(shape[0] * shape[1], dtype=bool)
            flat[open_stream(seed, OBSERVED).permutation(flat.size)[:count]] = True
            observed = flat.reshape(shape)
        return design, noise, observed


def _stack(arrays: Sequence[NDArray[_Kind] | None]) -> NDArray[_Kind] | None:
    """Stack arrays of which all or none are there."""
    there = [array for array in arrays if array is not None]
    return np.stack(there) if there else None
