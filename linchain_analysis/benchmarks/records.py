"""Runs of any length without training: modules of a large model, and rows that look like real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from linchain_analysis.benchmarks.subjects import METHOD, TARGETS
from linchain_analysis.runs import Manifest, ModuleRecord

RANK = 16
_WIDTH = 4096
_FACTORS = (
    ("A", (_WIDTH, RANK)),
    *((f"W{number}", (RANK, RANK)) for number in (1, 2, 3)),
    ("B", (RANK, _WIDTH)),
)


def describe_run(num_modules: int) -> Manifest:
    """Return the manifest of a LinChain-3-16 run."""
    records = []
    for number in range(num_modules):
        layer, kind = number // len(TARGETS), TARGETS[number % len(TARGETS)]
        part = "self_attn" if kind in ("q_proj", "k_proj", "v_proj") else "mlp"
        name = f"model.layers.{layer}.{part}.{kind}"
        records.append(ModuleRecord(name, kind, layer, "default", _WIDTH, _WIDTH, 2.0, _FACTORS))
    return Manifest(command=("bench",), method=METHOD, problem="synthetic", modules=tuple(records), init_seed=0)


class SyntheticRows:
    """Draws the rows of steps; every number has the entropy of a measured one.

    Args:
        manifest: Names the modules and factors.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._modules = [record.module for record in manifest.modules]
        self._factors = [name for name, _ in _FACTORS]
        self._random = np.random.default_rng(0)

    def draw_modules(self, steps: Sequence[int]) -> dict[str, Any]:
        """Return columns of `modules`, step by step."""
        num_rows = len(steps) * len(self._modules)
        decay = np.exp(-0.2 * np.arange(RANK))
        spectra = [np.sort(self._random.random((num_rows, RANK)), axis=1)[:, ::-1] * decay for _ in range(2)]
        return {
            "step": np.repeat(steps, len(self._modules)),
            "module": self._modules * len(steps),
            "spectrum": list(spectra[0]),
            "delta_update_spectrum": list(spectra[1] * 1e-3),
            "descent_cosine": self._random.random(num_rows),
        }

    def draw_factors(self, steps: Sequence[int]) -> dict[str, Any]:
        """Return columns of `factors`, step by step."""
        num_rows = len(steps) * len(self._modules) * len(self._factors)
        names = ("grad_norm", "grad_cosine_previous", "update_norm", "weight_norm", "update_ratio")
        modules = [module for module in self._modules for _ in self._factors]
        return {
            "step": np.repeat(steps, len(modules)),
            "module": modules * len(steps),
            "factor": self._factors * (len(self._modules) * len(steps)),
            **{name: self._random.random(num_rows) for name in names},
        }

    def draw_steps(self, steps: Sequence[int]) -> dict[str, Any]:
        """Return columns of `steps`."""
        names = ("loss", "learning_rate", "grad_norm", "clip_coef", "seconds", "track_seconds")
        return {
            "step": list(steps),
            "skipped": [False] * len(steps),
            **{name: self._random.random(len(steps)) for name in names},
        }
