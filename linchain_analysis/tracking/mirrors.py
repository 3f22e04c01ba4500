"""Mirror the scalars of a run to a tracker of experiments. No torch until one is opened."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_analysis.errors import InputError, RunError
from linchain_analysis.tracking.feed import Feed
from linchain_analysis.tracking.mirror_process import Opening, Row

if TYPE_CHECKING:
    from linchain_analysis.probes import Chain
    from linchain_analysis.runs import Manifest
    from linchain_analysis.tracking.observers import FinishedStep
    from linchain_analysis.tracking.scalars import StepScalars

logger = logging.getLogger("linchain_analysis")

MIRRORS = ("tensorboard", "wandb", "trackio")
# Of 224 modules these are thousands of scalars a step, which cost a mirror more than the whole tracker.
NUM_WHOLE_STEPS = 100
THINNED_EVERY = 10
_HELD_STEPS = 2  # a loss that is logged from a GPU is known one step later
_CLOSE_SECONDS = 30.0
# What names a run of the script's own, or ties a process to the script's session.
_SCRIPT_ONLY = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_SERVICE", "WANDB_DIR", "WANDB_SWEEP_ID")


def check_mirrors(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in `report_to`, each once; a name may be several, separated by commas.

    Raises:
        InputError: A name that is none of `MIRRORS`, or one whose package is not installed.
    """
    given = [report_to] if isinstance(report_to, str) else list(report_to)
    names = dict.fromkeys(part.strip() for name in given for part in str(name).split(","))
    for name in names:
        if name not in MIRRORS:
            raise InputError("report_to", expected=f"one of {', '.join(MIRRORS)}", got=repr(name), do="check the name")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder `wandb` that an earlier run left is found, but is no package
            raise InputError(
                "report_to",
                expected=f"{name} to be installed",
                got="no such package",
                do="do pip install 'linchain-analysis[mirrors]'",
            )
    return tuple(names)


def open_mirrors(
    names: Sequence[str], chains: Sequence[Chain], manifest: Manifest, path: Path, *, after: int = 0
) -> list[Mirror]:
    """Open the mirrors of these names; one that cannot be opened is left out with a warning.

    Args:
        names: Of `MIRRORS`.
        chains: What is recorded.
        manifest: What the run says of itself.
        path: The run folder.
        after: The step after which a training goes on from a checkpoint.
    """
    if not names:
        return []
    from linchain_analysis.tracking.scalars import StepScalars

    scalars = StepScalars(chains)
    mirrors = []
    for name in names:
        try:
            mirrors.append(Mirror(name, scalars, _describe(manifest, path, after), path.absolute(), after))
        except Exception as error:
            logger.warning("tracker: %s is not mirrored to (%s: %s).", name, type(error).__name__, error)
    return mirrors


class Mirror:
    """Shows each step to one tracker of experiments, through a process of its own (`mirror_process.py`).

    Scalars of modules and factors go there for the first 100 recorded steps, then for each tenth; those of the table
    `steps` always.
    """

    def __init__(self, kind: str, scalars: StepScalars, config: Mapping[str, Any], folder: Path, after: int) -> None:
        self.name = f"the mirror to {kind}"
        self._scalars = scalars
        self._num_recorded = 0
        self._held: dict[int, tuple[dict[str, float], Any]] = {}
        self._own: set[str] = set()
        self._feed: Feed | None = Feed(
            f"report_to {kind}",
            "linchain_analysis.tracking.mirror_process",
            folder / f"mirror-{kind}.log",
            _environment(kind),
        )
        beside = _script_run() if kind == "wandb" else None
        self._feed.send(Opening(kind, str(folder), tuple(scalars.names), config, after, beside))

    def see(self, finished: FinishedStep) -> None:
        """Take a step; it is sent when nothing more is likely to be logged of it."""
        values = None
        if finished.reading is not None:
            self._num_recorded += 1
            if self._num_recorded <= NUM_WHOLE_STEPS or self._num_recorded % THINNED_EVERY == 0:
                values = self._scalars.of(finished)
        row = {f"steps/{name}": value for name, value in finished.values.items()}
        self._own.update(row)
        self._held[finished.step] = (row, values)
        self._send(keep=_HELD_STEPS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take scalars of a step that are known by name; a step's own columns only until it has been sent."""
        if step in self._held:
            self._held[step][0].update(values)
        elif new := {name: value for name, value in values.items() if name not in self._own}:
            self._put(Row(step, new))

    def close(self) -> None:
        """Send what is held and wait for the mirror to be done, at most 30 s."""
        if self._feed is None:
            return
        self._send(keep=0)
        feed, self._feed = self._feed, None
        feed.close(_CLOSE_SECONDS)
        if feed.num_left_out:
            logger.warning(
                "tracker: %s could not keep up; %d rows of scalars were left out there.", self.name, feed.num_left_out
            )

    def _send(self, *, keep: int) -> None:
        while len(self._held) > keep:
            step = next(iter(self._held))
            row, values = self._held.pop(step)
            self._put(Row(step, row, values))

    def _put(self, row: Row) -> None:
        if self._feed is None:
            return
        try:
            self._feed.send(row)
        except RunError:  # said once, by whoever called
            self._feed = None
            raise


def _describe(manifest: Manifest, path: Path, after: int) -> dict[str, Any]:
    names = ("method", "problem", "preset", "every", "base_learning_rate", "init_seed", "data_seed", "num_steps")
    described = {name: getattr(manifest, name) for name in names}
    described |= {"num_modules": len(manifest.modules), "run_folder": str(path.absolute())}
    return {**described, "resumed_after": after} if after else described


def _environment(kind: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _SCRIPT_ONLY}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if kind == "trackio" and not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
        environment["HF_HUB_OFFLINE"] = "1"  # it would ask the hub for the user's name
    return environment


def _script_run() -> dict[str, str]:
    """Where the W&B run is that the script itself has open."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return {}
    mode = "disabled" if getattr(run, "disabled", False) else "offline" if getattr(run, "offline", False) else ""
    found = {"project": run.project, "entity": run.entity, "group": run.group or run.id, "mode": mode}
    return {name: str(value) for name, value in found.items() if value}
