"""Train a grid of chains on synthetic maps, stack by stack, and write each chain as a run of its own."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from linchain_analysis.errors import InputError, LinchainError
from linchain_analysis.measures.cores import ratio
from linchain_analysis.problems.synthetic import LinearMaps
from linchain_analysis.runs import Manifest, ModuleRecord, write_run
from linchain_analysis.runs.manifest import describe_hardware, installed_packages, now
from linchain_analysis.tracking.presets import Selection, select
from linchain_analysis.training.events import Event, RunFailed, RunFinished, RunStarted, RunStepped
from linchain_analysis.training.execution import GridResult, carry_out
from linchain_analysis.training.progress import Progress
from linchain_analysis.training.synthetic.batch import Trained, train_chains
from linchain_analysis.training.synthetic.grid import MapGrid, MapRunSettings, PlannedMapRun
from linchain_analysis.training.synthetic.initial_stacks import stack_runs
from linchain_analysis.training.synthetic.recording import StackRecorder, added_columns, choose_steps, name_factors
from linchain_analysis.training.workers import count_cores

MODULE = "map"
_STACK_BYTES = 1 << 20  # of ΔW in one stack, so that it stays in a core's cache
_LARGEST_STACK = 256  # runs: their rows are in memory at once
_REPORT_SECONDS = 0.2


def run_map_grid(
    grid: MapGrid, out: str | Path, *, num_threads: int | None = None, progress: Progress | None = None
) -> GridResult:
    """Train every run of `grid` and write it into its own folder under `out`.

    Chains of one shape are trained as one computation, and yet the numbers of a run depend on no other run. Runs that
    are complete with the same settings are skipped. Ctrl-C is passed on, and the next call goes on from there.

    Args:
        grid: What to train.
        out: Folder of runs, made where it is missing.
        num_threads: Threads; by default one for each usable core.
        progress: Who shows the progress; by default bars on a terminal and lines elsewhere.

    Raises:
        InputError: If a setting cannot be: before anything is trained.
        RunError: If `out` cannot be written, holds runs of another problem or other things under a run's name, or is
            in use by another sweep.
    """
    if num_threads is not None and num_threads < 1:
        raise InputError("num_threads", expected="at least 1", got=str(num_threads), do="leave it out for one per core")

    def work(to_do: Sequence[PlannedMapRun], out: Path) -> Generator[Event]:
        # Here too, since the threads of `train_maps` begin and end their own limits at any time.
        with threadpool_limits(1, user_api="blas"):
            yield from train_maps(to_do, out, num_threads=num_threads or count_cores())

    runs = grid.runs()
    return carry_out(runs, Path(out), grid.to_json(), work, progress, problem=runs[0].settings.label_problem())


def train_maps(runs: Sequence[PlannedMapRun], out: Path, *, num_threads: int) -> Generator[Event]:
    """Train `runs`, which share all but method, learning rate and seeds, and yield what happens.

    Args:
        runs: What to train.
        out: Folder of runs.
        num_threads: Threads, each of which trains a stack at a time and writes its runs.
    """
    common = _Common.of(runs)
    stacks = _split(runs)
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    numbers = itertools.count(1)
    own = threading.local()

    def work(stack: Sequence[PlannedMapRun]) -> None:
        if not hasattr(own, "number"):
            own.number = next(numbers)
        try:
            if not stopped.is_set():
                _train_stack(stack, common, out, own.number, events.put, stopped)
            events.put(None)
        except _Stopped:
            events.put(None)
        except BaseException as error:  # it is raised again in the thread that asked
            events.put(error)

    pool = ThreadPoolExecutor(min(num_threads, len(stacks)), thread_name_prefix="maps")
    try:
        for stack in stacks:
            pool.submit(work, stack)
        left = len(stacks)
        while left:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Stopped(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True)
class _Common:
    """What all runs of a grid share."""

    problem: LinearMaps
    place_of_seed: dict[int, int]
    selection: Selection
    recorded: np.ndarray
    manifest: Manifest

    @classmethod
    def of(cls, runs: Sequence[PlannedMapRun]) -> _Common:
        first = runs[0].settings
        seeds = sorted({run.settings.data_seed for run in runs})
        selection = select(first.preset, first.measures or None)
        return cls(
            problem=first.problem.draw(seeds),
            place_of_seed={seed: k for k, seed in enumerate(seeds)},
            selection=selection,
            recorded=choose_steps(first.every, first.num_steps),
            manifest=Manifest(
                command=tuple(sys.argv),
                preset=selection.name,
                every=str(first.every),
                packages=installed_packages(),
                hardware=describe_hardware(),
                measures=tuple(measure.name for measure in selection.measures),
                columns=added_columns(selection),
                num_steps=first.num_steps,
            ),
        )


def _split(runs: Sequence[PlannedMapRun]) -> list[list[PlannedMapRun]]:
    """Runs whose chains have one shape, in portions of a size that suits the cache, in the order of the grid."""
    d_in, d_out = runs[0].settings.problem.shape
    size = min(max(1, _STACK_BYTES // (8 * d_in * d_out)), _LARGEST_STACK)
    alike: dict[tuple[int, ...], list[tuple[int, PlannedMapRun]]] = defaultdict(list)
    for place, run in enumerate(runs):
        alike[run.settings.chain.widths].append((place, run))
    portions = [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]
    return [[run for _, run in portion] for portion in sorted(portions, key=lambda portion: portion[0][0])]


def _train_stack(
    runs: Sequence[PlannedMapRun],
    common: _Common,
    out: Path,
    worker: int,
    tell: Callable[[Event], None],
    stopped: threading.Event,
) -> None:
    began = time.monotonic()
    manifest = replace(common.manifest, started=now())
    settings = [run.settings for run in runs]
    name = runs[0].name + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    tell(RunStarted(worker, name, len(runs)))
    stack = stack_runs(settings, common.place_of_seed)
    seeds = np.unique(stack.index)
    problem, stack = common.problem.take(seeds), replace(stack, index=np.searchsorted(seeds, stack.index))
    recorder = StackRecorder(problem, stack, common.selection, common.recorded)
    num_steps = settings[0].num_steps
    last = began

    def on_step(step: int) -> None:
        nonlocal last
        if stopped.is_set():
            raise _Stopped
        if time.monotonic() - last >= _REPORT_SECONDS:
            last = time.monotonic()
            tell(RunStepped(worker, name, step, num_steps, None))

    trained = train_chains(
        problem,
        stack,
        settings[0].optimizer,
        num_steps,
        observe=recorder.observe,
        observe_at=recorder.records,
        on_step=on_step,
        num_threads=1,
    )
    outcome = _Outcome(problem, trained, stack.index)
    written = 0
    for k, run in enumerate(runs):
        if stopped.is_set():
            raise _Stopped
        try:
            write_run(
                out / run.name, _complete_manifest(manifest, run.settings), recorder.tables(k) | outcome.tables(k, run)
            )
            written += 1
        except (LinchainError, OSError) as error:
            tell(RunFailed(worker, run.name, " ".join(str(error).split()), ""))
    tell(RunFinished(worker, name, time.monotonic() - began, written))


class _Outcome:
    """Losses of the chains of one stack, as rows."""

    def __init__(self, problem: LinearMaps, trained: Trained, index: np.ndarray) -> None:
        self._trained = trained
        size = problem.target_losses[index]
        with np.errstate(over="ignore"):  # of a target whose own loss is all but nothing
            self._relative = ratio(trained.population_loss, size[:, None])
        rank = min(factor.shape[-1] for factor in trained.factors[:-1])
        # What no matrix of the chain's rank can undercut on new inputs, whatever the training data are.
        exact = replace(problem, design=None, noise=None, observed=None, weight=1.0, power=2, batch_size=None)
        self._population_excess = trained.population_loss - exact.smallest_losses(rank)[index][:, None]

    def tables(self, k: int, run: PlannedMapRun) -> dict[str, dict[str, Any]]:
        trained, num_steps = self._trained, run.settings.num_steps
        steps = np.arange(1, num_steps + 1)
        after = {"excess_loss": trained.excess_loss[k, 1:], "relative_loss": self._relative[k, 1:]}
        ends = {
            "relative_loss": self._relative[k, [0, -1]],
            "population_excess_loss": self._population_excess[k, [0, -1]],
        }
        return {
            "steps": {
                "step": steps,
                "loss": trained.loss[k],
                "learning_rate": np.full(num_steps, run.settings.learning_rate * run.settings.rate_factors[0]),
                "grad_norm": trained.grad_norm[k],
                "clip_coef": np.ones(num_steps),
                # `seconds` and `track_seconds` are null: a run that is computed with others has no clock of its own.
                "skipped": np.zeros(num_steps, dtype=bool),
            },
            "scalars": {
                "step": np.tile(steps, len(after)),
                "name": np.repeat(list(after), num_steps),
                "value": np.concatenate(list(after.values())),
            },
            "evals": {
                "step": np.tile([0, num_steps], len(ends)),
                "split": ["population"] * 2 * len(ends),
                "metric": np.repeat(list(ends), 2),
                "value": np.concatenate(list(ends.values())),
            },
        }


def _complete_manifest(manifest: Manifest, settings: MapRunSettings) -> Manifest:
    d_in, d_out = settings.problem.shape
    widths = settings.chain.widths
    shapes = list(itertools.pairwise((d_in, *widths, d_out)))
    names = name_factors(len(shapes))
    return replace(
        manifest,
        method=settings.method,
        problem=settings.label_problem(),
        base_learning_rate=settings.learning_rate,
        init_seed=settings.init_seed,
        data_seed=settings.data_seed,
        modules=(
            ModuleRecord(
                module=MODULE,
                kind=MODULE,
                layer=None,
                adapter="default",
                d_in=d_in,
                d_out=d_out,
                scale=settings.scaling,
                factors=tuple(zip(names, shapes, strict=True)),
            ),
        ),
        extra={"settings": settings.to_json(), "loss_unit": "1"},
    )
