"""Small runs with known numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from linchain_analysis.runs import Manifest, ModuleRecord, RunWriter

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
FACTORS = ("A", "W1", "B")


def manifest(**changes: Any) -> Manifest:
    records = tuple(
        ModuleRecord(
            module=name,
            kind=name.rpartition(".")[2],
            layer=layer,
            adapter="default",
            d_in=8,
            d_out=6,
            scale=2.0,
            factors=(("A", (8, 2)), ("W1", (2, 2)), ("B", (2, 6))),
        )
        for layer, name in enumerate(NAMES)
    )
    return Manifest(**{"command": ("train.py",), "method": "moslora-2", "modules": records, **changes})


def append_step(writer: RunWriter, step: int, *, with_steps_row: bool = True) -> None:
    rng = np.random.default_rng(step)
    writer.append(
        "modules",
        {
            "step": [step] * 2,
            "module": list(NAMES),
            "spectrum": [np.array([3.0, 1.0]) * step, np.zeros(2)],
            "delta_update_spectrum": [rng.random(4), rng.random(3)],
            "descent_cosine": rng.random(2),
        },
    )
    writer.append(
        "factors",
        {
            "step": [step] * 6,
            "module": [name for name in NAMES for _ in FACTORS],
            "factor": list(FACTORS) * 2,
            "grad_norm": rng.random(6),
            "update_norm": rng.random(6),
            "weight_norm": rng.random(6),
        },
    )
    if with_steps_row:
        writer.append("steps", {"step": [step], "loss": [10.0 / step], "grad_norm": [0.5], "skipped": [False]})


def write_run(path: Path, num_steps: int = 3, *, close: bool = True, **changes: Any) -> RunWriter:
    writer = RunWriter(path, manifest(**changes))
    for step in range(1, num_steps + 1):
        append_step(writer, step)
    writer.append("evals", {"step": [num_steps], "split": ["eval"], "metric": ["accuracy"], "value": [0.5]})
    if close:
        writer.close()
    return writer
