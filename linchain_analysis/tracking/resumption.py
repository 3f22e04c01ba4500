"""Open the folder of a run: a new one, or the one that a training resumed from a checkpoint goes on with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim import Optimizer

from linchain_analysis.errors import InputError, LinchainError
from linchain_analysis.probes import Chain, Start
from linchain_analysis.runs import Manifest, Run, RunWriter, load_run, read_start

logger = logging.getLogger("linchain_analysis")

Resume = int | bool | None
# The weights that a checkpoint brings back are those that were recorded, but for their storage in fewer bits.
_SAME_NORM = 1e-2


@dataclass(frozen=True)
class Opened:
    """A run that can be written.

    Attributes:
        writer: Writes it.
        num_steps: How many steps it has already.
        start: Where its training began, if that is not now.
    """

    writer: RunWriter
    num_steps: int = 0
    start: Start | None = None


def check_resume(resume: Resume) -> None:
    """Refuse what is no step.

    Raises:
        InputError: A negative number or no number.
    """
    if resume is not None and not (isinstance(resume, int) and resume >= 0):
        raise InputError(
            "resume",
            expected="the step of the checkpoint, False for a new run, or None to find out",
            got=repr(resume),
            do="pass one of these",
        )


def open_run(path: Path, manifest: Manifest, chains: Sequence[Chain], optimizer: Optimizer, resume: Resume) -> Opened:
    """Open `path`; where it holds a run, go on with it if this is the same training, else take the next free name.

    It is the same training if it has the same modules, the run has the step at which the training stands, and the
    weights are those that were recorded there. A run that another process is writing is left alone.

    Args:
        path: The run folder.
        manifest: What this run says of itself.
        chains: What it records.
        optimizer: Its state tells at which step a training stands, where `resume` does not.
        resume: The step of the checkpoint, False for a new run, None or True to find out.
    """
    if (path / "manifest.json").exists() and resume is not False and chains:
        try:
            opened = _go_on(path, manifest, chains, optimizer, resume)
        except (LinchainError, OSError) as error:
            logger.warning("tracker: the run in %s cannot be gone on with (%s).", path, error)
            opened = None
        if opened is not None:
            logger.warning("tracker: going on with %s after step %d.", path, opened.num_steps)
            return opened
    number = 1
    while True:
        free = number_path(path, number)
        if not (free / "manifest.json").exists():
            try:
                writer = RunWriter(free, manifest)
            except LinchainError:  # left without a manifest, or another process was faster
                number += 1
                continue
            break
        number += 1
    if free != path:
        logger.warning("tracker: %s holds a run already; this one is written to %s.", path, free)
    return Opened(writer)


def number_path(path: Path, number: int) -> Path:
    """Return `path` for the first of several runs, `path-2` for the second, and so on."""
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _go_on(
    path: Path, manifest: Manifest, chains: Sequence[Chain], optimizer: Optimizer, resume: Resume
) -> Opened | None:
    stands_at = _optimizer_steps(optimizer) if resume is None or resume is True else resume
    if not stands_at:
        return None
    run = load_run(path, damaged="drop")
    if [(m.module, m.factors) for m in run.manifest.modules] != [(m.module, m.factors) for m in manifest.modules]:
        return None
    step = stands_at if isinstance(resume, int) and resume is not True else _step_of_update(run, stands_at)
    if step is None or step > run.num_steps or not _weights_agree(run, step, chains):
        return None
    factors, squares = read_start(path)
    scales = {record.module: record.scale for record in run.manifest.modules}
    return Opened(RunWriter.resume(path, manifest, after=step), step, Start(factors, squares, scales))


def _optimizer_steps(optimizer: Optimizer) -> int:
    """How many updates the state of an optimiser has seen; 0 where it keeps no count."""
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(max(counts, default=0))


def _step_of_update(run: Run, num_updates: int) -> int | None:
    """The step that made that many updates: skipped steps make none."""
    steps = run.read("steps", ["step", "skipped"])
    made = np.cumsum(~steps["skipped"].fillna(False).to_numpy(dtype=bool))
    found = np.flatnonzero(made == num_updates)
    return int(steps["step"].iloc[found[0]]) if len(found) else None


@torch.no_grad()
def _weights_agree(run: Run, step: int, chains: Sequence[Chain]) -> bool:
    """Whether the factors are those of `step`, as far as that was recorded."""
    rows = run.read("factors", ["step", "module", "factor", "weight_norm"])
    rows = rows[rows["step"] == step]
    recorded = {
        (str(module), str(factor)): float(norm)
        for module, factor, norm in zip(rows["module"], rows["factor"], rows["weight_norm"], strict=True)
    }
    for chain in chains:
        for factor in chain.factors:
            norm = recorded.get((chain.module, factor.name))
            if norm is None or hasattr(factor.parameter, "full_tensor"):  # not recorded, or not whole on this process
                continue
            now = float(torch.linalg.vector_norm(factor.parameter.detach().double().cpu()))
            if abs(now - norm) > _SAME_NORM * max(now, norm):
                return False
    return True
