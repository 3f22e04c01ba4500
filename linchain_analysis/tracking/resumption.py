"""Open the folder of a run: a new one, or the one that a training resumed from a checkpoint goes on with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Optimizer

from linchain_analysis.errors import InputError, LinchainError, RunError
from linchain_analysis.probes import Chain, Start
from linchain_analysis.runs import Manifest, ModuleRecord, Run, RunWriter, load_run, read_start
from linchain_analysis.tracking.history import History, read_history
from linchain_analysis.tracking.sameness import find_other_delta, find_other_weight

logger = logging.getLogger("linchain_analysis")

Resume = int | bool | None
_MOST_FOLDERS = 1000  # of one name; where none of so many can be had, the fault is another


@dataclass(frozen=True)
class Opened:
    """A run that can be written.

    Attributes:
        writer: Writes it.
        num_steps: How many steps it has already.
        start: Where its training began, if that is not now.
        history: What it holds already.
    """

    writer: RunWriter
    num_steps: int = 0
    start: Start | None = None
    history: History = field(default_factory=History)


class _OtherTrainingError(Exception):
    """Why a run is not the one that a training goes on with."""


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
    weights are those that were recorded there. Where `path` holds another run, those that were put beside it for that
    reason are looked at too. A run that somebody else is writing is left alone.

    Args:
        path: The run folder.
        manifest: What this run says of itself.
        chains: What it records. Without any there is nothing to recognise a training by.
        optimizer: Its state tells at which step a training stands, where `resume` does not.
        resume: The step of the checkpoint, False for a new run, None or True to find out.

    Raises:
        RunError: No folder of that name can be had.
        OSError: It cannot be made or written.
    """
    said = resume if isinstance(resume, int) and not isinstance(resume, bool) else None
    stands_at = 0 if resume is False or not chains else _num_updates(optimizer) if said is None else said
    reason = ""
    if stands_at:
        for folder in _runs_of(path):
            try:
                opened = _go_on(folder, manifest, chains, stands_at, said=said is not None)
            except Exception as error:  # whatever is wrong with what lies there, this training is recorded
                known = isinstance(error, (_OtherTrainingError, LinchainError))
                reason = reason or (str(error) if known else f"{type(error).__name__}: {error}").rstrip(".")
                continue
            logger.warning("tracker: going on with %s after step %d.", folder, opened.num_steps)
            return opened
    writer = _begin(path, manifest)
    if reason:
        logger.warning(
            "tracker: expected %s to hold the run that this training goes on with, got another (%s); its steps are "
            "written to %s and counted from 1.",
            path,
            reason,
            writer.path,
        )
    elif writer.path != path:
        logger.warning("tracker: %s holds a run already; this one is written to %s.", path, writer.path)
    elif said:
        logger.warning(
            "tracker: expected a run in %s that goes on after step %d, found none; steps are counted from 1.",
            path,
            said,
        )
    return Opened(writer)


def number_path(path: Path, number: int) -> Path:
    """Return `path` for the first of several runs, `path-2` for the second, and so on."""
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _runs_of(path: Path) -> Iterator[Path]:
    """The run folders of that name, as far as there is no gap."""
    for number in count(1):
        folder = number_path(path, number)
        if not (folder / "manifest.json").exists():
            return
        yield folder


def _begin(path: Path, manifest: Manifest) -> RunWriter:
    """Begin a run in the first folder of that name that holds none."""
    last: RunError | None = None
    for number in range(1, _MOST_FOLDERS + 1):
        folder = number_path(path, number)
        if (folder / "manifest.json").exists():
            continue
        try:
            return RunWriter(folder, manifest)
        except RunError as error:  # what a run left behind without a manifest, or another process was faster
            last = error
    raise last or RunError(
        str(path), expected="a free name", got=f"{_MOST_FOLDERS} runs of it", do="choose another folder"
    )


def _go_on(folder: Path, manifest: Manifest, chains: Sequence[Chain], stands_at: int, *, said: bool) -> Opened:
    with warnings.catch_warnings():  # what is damaged is not gone on from, and what is not is not talked about
        warnings.simplefilter("ignore")
        run = load_run(folder, damaged="drop")
        _check_modules(run.manifest.modules, manifest.modules)
        step = _find_step(run, stands_at, said=said)
        other = find_other_weight(run.read("factors", _WEIGHTS), step, chains, take_word=said)
        if other:
            raise _OtherTrainingError(other)
        factors, squares = read_start(folder)
        if not factors and (other := find_other_delta(run.read("modules", _DELTAS), step, chains)):
            raise _OtherTrainingError(other)
        history = read_history(run, step)
        scales = {record.module: record.scale for record in run.manifest.modules}
        writer = RunWriter.resume(folder, manifest, after=step)
    return Opened(writer, step, Start(factors, squares, scales), history)


_WEIGHTS = ["step", "module", "factor", "weight_norm", "update_norm"]
_DELTAS = ["step", "module", "delta_norm"]


def _check_modules(before: Sequence[ModuleRecord], now: Sequence[ModuleRecord]) -> None:
    if [(m.module, m.factors) for m in before] != [(m.module, m.factors) for m in now]:
        raise _OtherTrainingError("its modules are others, or of another shape")
    for old, new in zip(before, now, strict=True):
        if not np.isclose(old.scale, new.scale, rtol=1e-6, atol=0, equal_nan=True):
            raise _OtherTrainingError(f"its scale of {old.module} was {old.scale:g} and is {new.scale:g}")


def _num_updates(optimizer: Optimizer) -> int:
    """How many updates the state of an optimiser has seen; 0 where it keeps no count."""
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    # Some keep it with their groups, and schedule-free ones as k.
    counts += [group[key] for group in optimizer.param_groups for key in ("step", "k") if key in group]
    return int(max((float(number) for number in counts if _is_number(number)), default=0))


def _is_number(value: Any) -> bool:
    try:
        return float(value) >= 0
    except (TypeError, ValueError, RuntimeError):
        return False


def _find_step(run: Run, stands_at: int, *, said: bool) -> int:
    """The step at which the training stands: the one said, or the one that made that many updates.

    Skipped steps make none. Whether those right after an update came before the checkpoint its state does not tell;
    they are taken to come again.
    """
    steps = run.read("steps", ["step", "skipped"])
    numbers = steps["step"].to_numpy()
    made = numbers if said else np.cumsum(~steps["skipped"].fillna(False).to_numpy(dtype=bool))
    found = np.flatnonzero(made == stands_at)
    if not len(found):
        what = "step" if said else "update"
        raise _OtherTrainingError(f"it has {made.max(initial=0)} {what}s and the training stands at {stands_at}")
    return int(numbers[found[0]])
