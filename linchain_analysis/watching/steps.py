"""The table `steps` as it grows, with what `log` said of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.watching.growing import Growing
from linchain_analysis.watching.view import NAN, WINDOW, StepsView

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "clip_coef", "skipped", "seconds", "track_seconds")


class StepsSoFar:
    """Collects rows of `steps` and the scalars that belong to them."""

    def __init__(self) -> None:
        self._rows = Growing(COLUMNS)
        self._waiting: list[tuple[int, str, float]] = []  # scalars of a step that has no row yet

    @property
    def finished(self) -> NDArray[np.float64]:
        """Numbers of the steps that have a row."""
        return self._rows["step"]

    def add(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Add steps: `COLUMNS` by name, ascending."""
        self._rows.append(rows, len(rows["step"]))

    def add_scalars(self, steps: Sequence[int], names: Sequence[str], values: Sequence[float]) -> None:
        """Let what `log` said override the rows; the last word counts."""
        said = [*self._waiting, *zip(steps, names, values, strict=True)]
        self._waiting = []
        finished = self.finished
        for step, name, value in said:
            if name not in COLUMNS or name == "step":
                continue
            place = int(np.searchsorted(finished, step))
            if place < len(finished) and finished[place] == step:
                self._rows[name][place] = value
            else:
                self._waiting.append((step, name, value))

    def view(self) -> StepsView:
        """Say how things stand."""
        if not len(self._rows):
            return StepsView()
        rows = self._rows
        known = rows["clip_coef"][np.isfinite(rows["clip_coef"])]
        seconds, own = rows["seconds"], rows["track_seconds"]
        recent = seconds[-WINDOW:][np.isfinite(seconds[-WINDOW:])]
        total = float(np.nansum(seconds)) if np.isfinite(seconds).any() else NAN
        tracked = own[np.isfinite(own)]
        finite = rows["loss"][-WINDOW:][np.isfinite(rows["loss"][-WINDOW:])]
        return StepsView(
            step=int(rows["step"][-1]),
            num_rows=len(rows),
            losses=rows["loss"].copy(),
            loss=float(rows["loss"][-1]),
            loss_mean=float(finite.mean()) if len(finite) else NAN,
            learning_rate=float(rows["learning_rate"][-1]),
            grad_norm=float(rows["grad_norm"][-1]),
            clipped_share=float((known < 1).mean()) if len(known) else NAN,
            num_skipped=int(np.nansum(rows["skipped"])),
            steps_per_second=len(recent) / float(recent.sum()) if recent.sum() > 0 else NAN,
            seconds=total,
            track_milliseconds=1e3 * float(np.median(tracked)) if len(tracked) else NAN,
            track_share=float(tracked.sum()) / max(total, 1e-9) if len(tracked) and total == total else NAN,
        )
