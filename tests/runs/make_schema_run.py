"""Make the runs in `data/schema-N`: run once when a schema version is released, then keep what it made for ever.

The values are simple functions of step and place, so that a test can know them without this script. What is here is
what the newest version holds; `schema-1` was made when there were no columns of measures, links and snapshots,
`schema-2` when there were no health and no runs that were resumed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from linchain_analysis.measures.cores import Cores
from linchain_analysis.runs import Manifest, ModuleRecord, RunWriter, pack_chain

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
FACTORS = (("A", (6, 2)), ("W1", (2, 2)), ("B", (2, 4)))
LINKS = ("A-W1", "W1-B")
MODULES = tuple(
    ModuleRecord(name, name.rpartition(".")[2], layer, "default", 6, 4, 2.0, FACTORS, refused="DoRA" if layer else None)
    for layer, name in enumerate(NAMES)
)
MANIFEST = Manifest(
    command=("train.py",),
    method="moslora-2",
    problem="sums",
    base_learning_rate=0.01,
    init_seed=1,
    data_seed=2,
    modules=MODULES,
    packages={"linchain-analysis": "0.1.0"},
    hardware={},
    started="2026-01-01T00:00:00+00:00",
    measures=("orders", "balance"),
    columns={"modules": (("first_order_share", "float"), ("order_ratios", "values"))},
)
SNAPSHOT_STEP = 2
PROCESS = {"pid": 1, "host": "elsewhere", "started": None}
# What follows when the run goes on: another preset, without the columns of `orders` and with one of its own.
NEXT = replace(
    MANIFEST,
    command=("train.py", "--resume"),
    preset="light",
    init_seed=None,
    packages={"linchain-analysis": "0.2.0"},
    started="2026-01-02T00:00:00+00:00",
    measures=("balance",),
    columns={"modules": (("second_share", "float"),)},
)
RESUMED_AFTER = 2


def snapshot_cores() -> Cores:
    """One chain whose factors hold 0, 1, 2, …, in the small coordinates of `FACTORS`; its changes are halves of it."""
    before = tuple(np.arange(1.0 * rows * width).reshape(1, rows, width) for rows, width in ((4, 2), (2, 2), (2, 4)))
    return Cores(
        scale=np.array([2.0]),
        before=before,
        change=tuple(factor / 2 for factor in before),
        gradient=(np.full((1, 4, 2), np.nan), -before[1], -before[2]),
        size=(6, 4),
        learning_rate=np.array([[0.01, 0.01, 0.02]]),
    )


def write_step(writer: RunWriter, step: int) -> None:
    """Append what one step records: sigma = (4, 3)·step of q_proj, up_proj is refused."""
    writer.append(
        "modules",
        {
            "step": [step, step],
            "module": list(NAMES),
            "spectrum": [np.array([4.0, 3.0]) * step, None],
            "delta_update_spectrum": [np.array([1.0, 1.0, 0.0]), None],
            "descent_cosine": [0.5, -0.25],
            "first_order_share": [1 - step / 8, np.nan],
            "order_ratios": [np.array([1.0, step / 4, 0.125]), None],
        },
    )
    rows = [(module, factor) for module in NAMES for factor, _ in FACTORS]
    writer.append(
        "factors",
        {
            "step": [step] * len(rows),
            "module": [module for module, _ in rows],
            "factor": [factor for _, factor in rows],
            "grad_norm": [step + place / 8 for place in range(len(rows))],
        },
    )
    writer.append(
        "links",
        {
            "step": [step] * len(LINKS),
            "module": [NAMES[0]] * len(LINKS),
            "link": list(LINKS),
            "balance_drift": [step / 16, step / 32],
        },
    )
    if step == SNAPSHOT_STEP:
        whole = {"W1": np.array([[0.0, 1.0], [np.nan, 3.0]], dtype=np.float32)}
        tensors = [pack_chain(snapshot_cores(), 0, whole)]
        writer.append("snapshots", {"step": [step], "module": [NAMES[0]], "tensors": tensors})
    writer.append("steps", {"step": [step], "loss": [1 / step], "learning_rate": [0.01], "skipped": [False]})


def write_run(path: Path, num_steps: int) -> RunWriter:
    """Write a run and leave it open."""
    writer = RunWriter(path, MANIFEST)
    writer.append("evals", {"step": [0], "split": ["eval"], "metric": ["accuracy"], "value": [0.125]})
    for step in range(1, num_steps + 1):
        write_step(writer, step)
    writer.append("scalars", {"step": [2, 2, 99], "name": ["loss", "aux", "loss"], "value": [7.0, 8.0, 9.0]})
    finding = {"step": [1, 3], "finding": ["spike", "spike"], "subject": ["loss", "loss"]}
    writer.append("health", {**finding, "began": [True, False], "message": ["loss rose", "loss is as before"]})
    return writer


def write_next_part(path: Path) -> RunWriter:
    """Go on after step 2 with steps 3 and 4, and leave the run open."""
    writer = RunWriter.resume(path, NEXT, after=RESUMED_AFTER)
    writer.append("evals", {"step": [0, 2], "split": ["eval"] * 2, "metric": ["accuracy"] * 2, "value": [0.25, 0.5]})
    for step in (3, 4):
        writer.append(
            "modules", {"step": [step], "module": [NAMES[0]], "delta_norm": [step * 8.0], "second_share": [step / 8]}
        )
        writer.append("steps", {"step": [step], "loss": [step * 2.0], "learning_rate": [0.02], "skipped": [True]})
    writer.append("scalars", {"step": [4], "name": ["aux"], "value": [16.0]})
    writer.append(
        "health",
        {"step": [4], "finding": ["idle"], "subject": [NAMES[1]], "began": [True], "message": ["it does not move"]},
    )
    return writer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    complete = write_run(folder / "complete", 3)
    complete.update_manifest(process=PROCESS)
    complete.close()
    killed = write_run(folder / "killed", 3)
    killed.update_manifest(process=PROCESS)
    # A step whose row of `steps` was never written, and a batch that a kill cut short.
    killed.append("modules", {"step": [4], "module": [NAMES[0]], "spectrum": [np.array([9.0])]})
    stream = folder / "killed" / "factors.arrows"
    stream.write_bytes(stream.read_bytes()[:-40])
    first = write_run(folder / "resumed", 3)
    first.update_manifest(process=PROCESS)
    del first
    resumed = write_next_part(folder / "resumed")
    resumed.update_manifest(process=PROCESS)
    resumed.close()
    for lock in folder.glob("*/.lock"):
        lock.unlink()
