"""Run a grid: check everything, skip what is complete, train the rest in worker processes."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linchain_analysis.errors import InputError, RunError
from linchain_analysis.training.events import Event, RunFailed
from linchain_analysis.training.grid import Grid, PlannedRun
from linchain_analysis.training.progress import Progress, show_progress
from linchain_analysis.training.resumption import PlannedT, clear, find_standing, refuse_other_problems
from linchain_analysis.training.workers import count_cores, work_through

GRID_FILE = "sweep.json"
_LOCK_FILE = ".sweep.lock"


@dataclass(frozen=True)
class GridResult:
    """What became of a grid.

    Attributes:
        complete: Folders of all complete runs, in the grid's order; those of earlier times included.
        num_skipped: How many of these were complete already.
        failed: The runs that ended by an error.
    """

    complete: tuple[Path, ...]
    num_skipped: int
    failed: tuple[RunFailed, ...]


def run_grid(
    grid: Grid, out: str | Path, *, num_workers: int | None = None, progress: Progress | None = None
) -> GridResult:
    """Train every run of `grid` into its own folder under `out`, in worker processes of one thread each.

    Runs that are complete with the same settings are skipped, half-finished ones are deleted and made again. A run
    that fails does not stop the others. Equal seeds give bit-identical runs, whichever worker trains them and in
    whatever order. Ctrl-C ends the workers and is passed on; the next call goes on from there.

    From a script, call it under `if __name__ == "__main__":`, since worker processes import the script.

    Args:
        grid: What to train.
        out: Folder of runs, made where it is missing.
        num_workers: Number of processes; by default one for each usable core, or for each GPU where there are any.
        progress: Who shows the progress; by default bars on a terminal and lines elsewhere.

    Raises:
        InputError: If a setting cannot be: before anything is trained.
        RunError: If `out` cannot be written, holds runs of another problem or other things under a run's name, or is
            in use by another sweep.
    """
    if num_workers is not None and num_workers < 1:
        raise InputError("num_workers", expected="at least 1", got=str(num_workers), do="leave it out for one per core")
    runs = plan_runs(grid)

    def work(to_do: Sequence[PlannedRun], out: Path) -> Generator[Event]:
        gpus = list_gpus()
        return work_through(to_do, out, num_workers=num_workers or len(gpus) or count_cores(), gpus=gpus)

    return carry_out(runs, Path(out), grid.to_json(), work, progress, problem=_name_problem(grid))


def carry_out(
    runs: Sequence[PlannedT],
    out: Path,
    content: Mapping[str, Any],
    work: Callable[[Sequence[PlannedT], Path], Generator[Event]],
    progress: Progress | None = None,
    *,
    problem: str,
) -> GridResult:
    """See that every run stands complete under `out`: skip those that do, have the rest done by `work`.

    Args:
        runs: The runs of a grid, every setting resolved.
        out: Folder of runs, made where it is missing.
        content: The grid as a JSON object, to be kept there.
        work: Does the runs that are to be done, each into its folder, and yields what happens; closing it ends it.
        progress: Who shows the progress; by default bars on a terminal and lines elsewhere.
        problem: What all runs learn, as their manifests say it.

    Raises:
        RunError: As `run_grid`.
    """
    _require_writable(out)
    with _exclusive(out):
        standing = find_standing(runs, out)
        refuse_other_problems(problem, out)
        _write_atomically(out / GRID_FILE, {"grid": content, "runs": [run.name for run in runs]})
        for run in standing.half_finished:
            clear(out / run.name)
        failed = []
        if standing.to_do:
            watcher = show_progress() if progress is None else progress
            events = work(standing.to_do, out)
            with closing(events), watcher.open(num_runs=len(runs), num_complete=len(standing.complete)) as show:
                for event in events:
                    show(event)
                    if isinstance(event, RunFailed):
                        failed.append(event)
    lost = {event.name for event in failed}
    complete = tuple(out / run.name for run in runs if run.name not in lost)
    return GridResult(complete=complete, num_skipped=len(standing.complete), failed=tuple(failed))


def plan_runs(grid: Grid) -> tuple[PlannedRun, ...]:
    """Return the runs of `grid` with every setting resolved, after trying what can be tried without training.

    Raises:
        InputError: If the problem, the model, the data or a method cannot be.
    """
    # Here and not above: these import torch and PEFT, and a wrong grid should be refused before that.
    from linchain_analysis.adapters import method_config
    from linchain_analysis.training.preparation import find_problem

    problem = find_problem(grid.first_settings)
    problem.load_tokenizer()
    for method in grid.methods:
        method_config(method, target_modules=list(problem.target_modules))
    return tuple(
        replace(run, settings=run.settings.resolve(problem.defaults))
        for run in grid.runs(problem.defaults.learning_rate)
    )


def _name_problem(grid: Grid) -> str:
    """Return what the manifests of the grid's runs call their problem."""
    from linchain_analysis.problems.loading import name_of_file

    settings = grid.first_settings
    return name_of_file(Path(settings.data)) if settings.data else settings.problem or "sums"


def list_gpus() -> list[str]:
    """Return the names of the usable GPUs, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return [name.strip() for name in visible.split(",") if name.strip()][: torch.cuda.device_count()]
    return [str(k) for k in range(torch.cuda.device_count())]


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"0")  # on a full disk files can be made, and nothing be written into them
    except OSError as error:
        raise RunError(
            str(out),
            expected="a folder that can be written",
            got=error.strerror or str(error),
            do="choose another folder",
        ) from error


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Keep a second sweep out of the same folder: it would take running runs for half-finished ones."""
    with open(out / _LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                str(out),
                expected="a folder that no other sweep writes to",
                got="one in use",
                do="wait for that sweep to end",
            ) from error
        yield


def _write_atomically(path: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    made: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            made = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o644)  # a temporary file is made readable for its owner alone
        made.replace(path)
    except OSError as error:
        raise RunError(
            str(path),
            expected="a file that can be written",
            got=error.strerror or str(error),
            do="make room on the disk, or choose another folder",
        ) from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)  # it is there still where something failed
