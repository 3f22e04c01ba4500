"""Run sets made of plain frames, for tests of what comes after reading: any value can be put anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linchain_analysis.analysis.replication import RUN_COLUMNS
from linchain_analysis.runs import Manifest, ModuleRecord, RunWriter

FACTORS = {
    "lora-16": ["A", "B"],
    "moslora-16": ["A", "W1", "B"],
    "linchain-2-8": ["A", "W1", "W2", "B"],
    "linchain-3-16": ["A", "W1", "W2", "W3", "B"],
}


class FrameRuns:
    """What `load_runs` returns, over frames instead of folders, and so without manifests."""

    runs: tuple[Any, ...] = ()

    def __init__(self, **tables: pd.DataFrame) -> None:
        self.tables = tables

    def read(self, table: str, columns: Iterable[str]) -> pd.DataFrame:
        frame = self.tables.get(table)
        if frame is None:
            return pd.DataFrame({name: pd.Series(dtype=float) for name in [*RUN_COLUMNS, *columns]})
        return frame[[*RUN_COLUMNS, *columns]]


def rows(
    method: str, seed: int | None, table: Mapping[str, Any], *, rate: float = 1e-3, problem: str = "sums"
) -> pd.DataFrame:
    """Rows of one run, with its identity in front."""
    frame = pd.DataFrame(dict(table))
    name = f"{problem}/{method}_lr{rate}_seed{seed}"
    identity = [name, problem, method, rate, seed, seed]
    for place, (column, value) in enumerate(zip(RUN_COLUMNS, identity, strict=True)):
        frame.insert(place, column, value)
    return frame


def comparison(num_seeds: int = 3, num_steps: int = 100, every: int = 1) -> FrameRuns:
    """Runs of the four methods of the paper that look like real ones."""
    steps, modules, factors, evals = [], [], [], []
    step = np.arange(1, num_steps + 1)
    recorded = step[(step - 1) % every == 0]
    for place, (method, names) in enumerate(FACTORS.items()):
        rank = 8 if method.endswith("-8") else 16
        for seed in range(num_seeds):
            random = np.random.default_rng([place, seed])
            loss = (
                0.4 + (2.5 - 0.2 * place) * np.exp(-step / (15 + 5 * place + seed)) + random.normal(0, 0.15, num_steps)
            )
            steps.append(rows(method, seed, {"step": step, "loss": np.abs(loss)}))
            evals.append(
                rows(
                    method, seed, {"step": [0, num_steps], "split": "eval", "metric": "accuracy", "value": [0.05, 0.8]}
                )
            )
            for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
                decay = (0.15 + 0.05 * place) * np.exp(random.normal(0, 0.1)) * (1 + np.exp(-recorded / 20))
                spectrum = list(np.exp(-np.outer(decay, np.arange(rank))) * 0.1 * np.sqrt(recorded)[:, None])
                modules.append(rows(method, seed, {"step": recorded, "module": module, "spectrum": spectrum}))
                for depth, factor in enumerate(names):
                    noise = np.exp(random.normal(0, 0.3, (2, len(recorded))))
                    grad = noise[0] * 10.0 ** (-1 - 0.4 * depth) * np.exp(-recorded / 80)
                    if factor != "B":
                        grad[0] = 0.0
                    table = {"step": recorded, "module": module, "factor": factor, "grad_norm": grad}
                    factors.append(rows(method, seed, {**table, "update_norm": noise[1] * 1e-2 / (1 + depth)}))
    frames = {"steps": steps, "modules": modules, "factors": factors, "evals": evals}
    return FrameRuns(**{name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()})


def write_comparison(folder: Path, runs: FrameRuns, preset: str = "standard") -> None:
    """Write `runs` as run folders under `folder`, named after method, learning rate and seed."""
    for name, steps in runs.tables["steps"].groupby("run"):
        identity = steps.iloc[0]
        own = {table: frame[frame["run"] == name] for table, frame in runs.tables.items()}
        method = str(identity["method"])
        modules = tuple(
            ModuleRecord(
                module, module.rsplit(".", 1)[-1], 0, "default", 4, 4, 2.0, tuple((f, (4, 4)) for f in FACTORS[method])
            )
            for module in own["factors"]["module"].unique()
        )
        manifest = Manifest(
            command=("train",),
            method=method,
            problem=str(identity["problem"]),
            preset=preset,
            base_learning_rate=float(identity["base_learning_rate"]),
            init_seed=int(identity["init_seed"]),
            data_seed=int(identity["data_seed"]),
            modules=modules,
        )
        writer = RunWriter(folder / str(name).replace("/", "-"), manifest)
        for table, frame in own.items():
            if len(frame):
                writer.append(table, {column: frame[column].to_list() for column in frame.columns[len(RUN_COLUMNS) :]})
        writer.close()
