"""What kind of map is learned, as data; a data seed makes one map of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic.maps import LinearMaps
from linchain_analysis.problems.synthetic.targets import BLOCKS, draw_block_target, draw_spectrum_target

Floats = NDArray[np.float64]
Loss = Literal["quadratic", "quartic"]
MAP_NAMES = (*BLOCKS, "spectrum")


@dataclass(frozen=True)
class MapSetting:
    """One kind of linear map.

    Attributes:
        name: One of `MAP_NAMES`.
        dim: d_in, and d_out unless that is said.
        dim_out: d_out.
        target_rank: Rank of the target, cut to what fits; the larger even number within 8 unless told otherwise.
        spectrum: Singular values of the target called `spectrum`, descending; `target_rank` ones unless told.
        input_decay: The inputs' covariance has the eigenvalues i^(−input_decay); 0 for whitened inputs.
        num_samples: Number of training inputs; None for the expectation over all inputs.
        batch_size: Number of fresh inputs drawn at every step, in place of `num_samples`.
        label_noise: Standard deviation of the noise in the labels.
        observed: Share of the target's entries that the loss sees; 1 for all (matrix completion below 1).
        loss: `quadratic` or `quartic`.
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
        if self.name not in MAP_NAMES:
            raise InputError(
                "problem", expected=f"one of {', '.join(MAP_NAMES)}", got=repr(self.name), do="choose one of them"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.dim, self.dim if self.dim_out is None else self.dim_out

    def draw(self, data_seeds: Sequence[int]) -> LinearMaps:
        """Return one map for each data seed: target, inputs and noise are drawn from it, and nothing else is."""
        drawn = [self._draw_one(seed) for seed in data_seeds]
        targets, designs, noises, observed = ([part[i] for part in drawn] for i in range(4))
        variances = np.arange(1, self.dim + 1.0) ** -self.input_decay
        return LinearMaps(
            targets=np.stack(targets),
            design=None if designs[0] is None else np.stack(designs),
            noise=None if noises[0] is None else np.stack(noises),
            observed=None if observed[0] is None else np.stack(observed),
            covariance=variances,
            weight=1 / self.num_samples if self.num_samples else 1.0,
            power=2 if self.loss == "quadratic" else 4,
            batch_size=self.batch_size,
            label_noise=self.label_noise,
            seeds=tuple(data_seeds),
        )

    def _draw_one(self, seed: int) -> tuple[Floats, Floats | None, Floats | None, NDArray[np.bool_] | None]:
        # Streams of their own, so that a target is the same whatever it is learned from.
        streams = [np.random.default_rng([seed, part]) for part in range(4)]
        shape = self.shape
        rank = min(self.target_rank, *shape)
        if self.name == "spectrum":
            sigma = np.asarray(self.spectrum if self.spectrum is not None else np.ones(rank), dtype=np.float64)
            target = draw_spectrum_target(sigma[: min(shape)], shape, streams[0])
        else:
            target = draw_block_target(self.name, shape, rank, streams[0])
        variances = np.arange(1, self.dim + 1.0) ** -self.input_decay
        design = noise = observed = None
        num_rows = self.dim
        if self.num_samples:
            num_rows = self.num_samples
            design = streams[1].standard_normal((num_rows, self.dim)) * np.sqrt(variances)
        elif self.input_decay and self.batch_size is None:
            design = np.diag(np.sqrt(variances))
        if self.label_noise and self.batch_size is None:
            noise = self.label_noise * streams[2].standard_normal((num_rows, shape[1]))
        if self.observed < 1:
            count = max(1, round(self.observed * num_rows * shape[1]))
            flat = np.zeros(num_rows * shape[1], dtype=bool)
            flat[streams[3].permutation(flat.size)[:count]] = True
            observed = flat.reshape(num_rows, shape[1])
        return target, design, noise, observed
