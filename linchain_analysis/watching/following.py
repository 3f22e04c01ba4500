"""Follow one run from before its first step until after its last."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from linchain_analysis.errors import DamageError, LinchainError
from linchain_analysis.runs.manifest import MANIFEST
from linchain_analysis.runs.reader import Run
from linchain_analysis.runs.schema import tables_of
from linchain_analysis.watching.intake import Intake, open_intake, stamp_of
from linchain_analysis.watching.view import NAN, RunView


class RunFollower:
    """Reads of a run what is new, each time it is asked how the run stands.

    It opens files for reading only, and for no longer than a look. What cannot be read becomes a view that says so.

    Args:
        path: The run folder.
        name: What to call it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.has_looked = False
        self._stamp: object = None  # of the manifest that was read
        self._intake: Intake | None = None
        self._trouble: RunView | None = None

    def look(self, deadline: float = math.inf) -> RunView:
        """Return how the run stands.

        Args:
            deadline: On the monotonic clock. If it takes longer to read what is there, the view is of what has been
                read, its status is `reading`, and the next look goes on.

        Raises:
            FileNotFoundError: The run is gone.
        """
        stamp = stamp_of(self.path)
        self.has_looked = True
        if self._trouble is not None and self._trouble.is_over and stamp == self._stamp:
            return self._trouble  # damage does not heal, and a look at it costs a reading of everything
        try:
            try:
                view = self._look(deadline)
            except (DamageError, FileNotFoundError):
                # Files change under one's feet when a run is completed: what is wrong still at a second look is damage.
                self._intake = None
                view = self._look(deadline)
        except LinchainError as error:
            status = "damaged" if isinstance(error, DamageError) else "unreadable"
            return self._give_up(stamp, status, f"{Path(error.place).name}: {error.got}; {error.do}")
        except OSError as error:
            if not (self.path / MANIFEST).exists():
                raise FileNotFoundError(self.path) from error
            return self._give_up(stamp, "unreadable", f"{Path(str(error.filename)).name}: {error.strerror}")
        self._trouble = None
        return view

    def _look(self, deadline: float) -> RunView:
        intake = self._read(deadline)
        is_alive: bool | None = False
        while not intake.manifest.tables and not intake.is_behind:
            before = intake.manifest
            is_alive = Run(self.path, before).is_alive
            if is_alive is not False:
                break
            # Its last rows, or that it is complete, may have been written before its process was found to be gone.
            intake = self._read(deadline)
            if intake.manifest is before:
                break
        return self._view(intake, is_alive)

    def _read(self, deadline: float) -> Intake:
        stamp = stamp_of(self.path)
        if self._intake is None or stamp != self._stamp:
            self._intake = open_intake(self.path, self._intake)
            self._stamp = stamp
        self._intake.read(deadline)
        return self._intake

    def _give_up(self, stamp: object, status: str, message: str) -> RunView:
        # What is wrong at one look only is a folder that is being deleted or copied.
        view = RunView(self.name, status, message, is_over=self._trouble is not None)
        if self._intake is not None:
            manifest = self._intake.manifest
            view = replace(view, method=manifest.method, problem=manifest.problem, started=manifest.started)
        self._stamp, self._intake, self._trouble = stamp, None, view
        return view

    def _view(self, intake: Intake, is_alive: bool | None) -> RunView:
        manifest, collected = intake.manifest, intake.collected
        steps = collected.steps.view()
        status, message, quiet = manifest.status, manifest.message, NAN
        if intake.is_behind:
            status = "reading"
        elif status == "running" and is_alive is False:
            status, message = "died", "its process is gone"
        elif status == "running" and steps.num_rows == 0:
            status = "starting"
        elif status == "running":
            quiet = max(time.time() - (intake.last_written() or math.nan), 0.0)
        ranks, rank = collected.ranks.view()
        ratios, ratio = collected.ratios.view()
        return RunView(
            name=self.name,
            status=status,
            message=message,
            # One that was marked by a signal goes on until its process has gone.
            is_over=status not in ("reading", "starting", "running") and is_alive is not True,
            method=manifest.method,
            problem=manifest.problem,
            preset=manifest.preset,
            started=manifest.started,
            num_steps=manifest.num_steps,
            quiet_seconds=quiet,
            steps=steps,
            ranks=ranks,
            rank=rank,
            ratios=ratios,
            ratio=ratio,
            is_examined="health" in tables_of(manifest.schema_version),
            findings=collected.findings.view(),
            evals=tuple(collected.evals.values()),
        )
