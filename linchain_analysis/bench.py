"""`python -m linchain_analysis.bench`: what tracking and the adapters cost, measured in pairs on this machine."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linchain_analysis.benchmarks.topics import TOPICS, Topic, choose_topics
from linchain_analysis.errors import InputError, LinchainError

if TYPE_CHECKING:
    from linchain_analysis.benchmarks.rows import Row

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

_DEVICES = ("cpu", "cuda")
# Libraries read these when they are loaded, and NumPy's would otherwise use every core beside torch's one thread.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# Torch's profiler, which measures memory, would otherwise tell of its starts and ends in the middle of the tables.
_SILENCE = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
_PLAIN_WIDTH = 120  # columns
_UNITS = {"ratio": "", "milliseconds": " ms", "seconds": " s", "bytes": " B"}
_MARKS = {True: "[green]yes[/]", False: "[red]missed[/]", None: ""}


@app.command()
def main(
    only: Annotated[
        str | None, typer.Option(help=f"Some topics, separated by commas: {', '.join(t.name for t in TOPICS)}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few pairs: shows that it works, not what it costs.")
    ] = False,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of each comparison.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Measure wandb, TensorBoard and naive spectra too.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of NumPy's linear algebra.")] = 1,
    device: Annotated[str, typer.Option(help=f"{' or '.join(_DEVICES)}.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows into this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw the figure `cost` into a folder below this one.")] = None,
    show_topics: Annotated[bool, typer.Option("--list", help="Show the topics and end.")] = False,
) -> None:
    """Measure costs in pairs: two variants in turns in one process, CPU and wall time, ratios pair by pair.

    A missed target is said in the table; the exit code tells only whether everything could be measured.
    """
    if show_topics:
        for topic in TOPICS:
            typer.echo(f"{topic.name:9} {topic.about}{' (with --peers)' if topic.on_request else ''}")
        return
    try:
        topics = choose_topics(only, peers=peers)
        if device not in _DEVICES:
            raise InputError("--device", expected=" or ".join(_DEVICES), got=repr(device), do="correct the name")
        os.environ.update(dict.fromkeys(_THREADS, str(threads)))
        for name, level in _SILENCE.items():
            os.environ.setdefault(name, level)
        _measure(topics, quick, pairs, threads, device, json_file, figures)
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def _measure(
    topics: Sequence[Topic],
    quick: bool,
    pairs: int | None,
    threads: int,
    device: str,
    json_file: Path | None,
    figures: Path | None,
) -> None:
    # Here and not above: a wrong option should be refused, and the number of threads set, before torch is loaded.
    import torch

    from linchain_analysis.benchmarks.machine import describe_machine
    from linchain_analysis.benchmarks.rows import write_rows
    from linchain_analysis.benchmarks.settings import Settings

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", expected="cuda where there is one", got="no CUDA device", do="use cpu")
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine = describe_machine(device)
    console, progress = _open_console(), Console(stderr=True)
    console.print(machine, highlight=False, soft_wrap=True)
    if quick:
        console.print("--quick: sizes and pairs are too few to judge by; this only shows that everything runs.")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="linchain-bench-") as scratch:
        settings = Settings(Path(scratch), quick=quick, num_pairs=pairs, device=device)
        for topic in topics:
            found: list[Row] = []
            with progress.status(f"{topic.name} …") as status:
                for row in topic.measure(settings):
                    found.append(row)
                    status.update(f"{topic.name}: {len(found)} rows, last {row.name}")
            rows += found
            console.print(_tabulate(topic, found, judged=not quick))
            if json_file is not None:  # after each topic: what takes long should not be lost with what comes later
                write_rows(json_file, rows, machine)
    if not quick:  # the targets are those of the full sizes
        num_met, num_targets = sum(row.met is True for row in rows), sum(row.target is not None for row in rows)
        console.print(f"{num_met} of {num_targets} targets met", highlight=False)
    if figures is not None:
        from linchain_analysis.benchmarks.figure import save_cost

        console.print(f"drawn: {save_cost(rows, machine, figures)}", highlight=False, soft_wrap=True)


def _open_console() -> Console:
    # Where nobody knows a width, in a file or a pipe, a row should still stand on one line.
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def _tabulate(topic: Topic, rows: Sequence[Row], *, judged: bool) -> Table:
    table = Table(title=f"{topic.name}: {topic.about}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", overflow="fold")
    for heading in ("median", "quartiles", "wall", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met")
    for row in rows:
        name = row.name.removeprefix(f"{topic.name}/")
        if row.median is None:
            table.add_row(f"{name}\n  {row.note}")
            continue
        unit = _UNITS.get(row.unit, f" {row.unit}")
        quartiles = "" if row.q25 == row.q75 else f"{_tell(row.q25)} … {_tell(row.q75)}"
        wall, target = _tell(row.extra.get("wall_ratio_median")), _tell(row.target)
        table.add_row(name, f"{_tell(row.median)}{unit}", quartiles, wall, target, _MARKS[row.met if judged else None])
    return table


def _tell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


if __name__ == "__main__":
    app()
