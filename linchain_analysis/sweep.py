"""`python -m linchain_analysis.sweep`: methods × learning rates × seeds, in worker processes that stay alive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linchain_analysis.errors import InputError, LinchainError

# Two lines a cell, and headings of two lines: eighty columns hold the table.
_HEADINGS = {"final_loss": "final loss", "accuracy": "accuracy", "final_effective_rank": "final\neffective rank"}


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of runs; what is complete there is not trained again.")],
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas.")] = None,
    problem: Annotated[str | None, typer.Option(help="Built-in problem; sums if no --data is given.")] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Learning rates, separated by commas; the problem's own if unset.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, … for initialisation and data alike.")] = 3,
    workers: Annotated[int | None, typer.Option(help="Worker processes; one for each core if unset.")] = None,
    model: Annotated[str | None, typer.Option(help="Another base model: a folder or a hub name.")] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON file of records with instruction, input, output and answer.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Layout of the prompts: plain, alpaca or alpaca-authors.")
    ] = None,
    num_eval: Annotated[int | None, typer.Option(help="Held-out records.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, in place of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records in one forward pass.")] = None,
    accumulation: Annotated[int, typer.Option(help="Forward passes in one optimiser step.")] = 1,
    max_grad_norm: Annotated[float, typer.Option(help="Norm to clip gradients to; 0 for no clipping.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Dropout in front of the adapters.")] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Base weights and autocast in bfloat16.")] = False,
    preset: Annotated[str, typer.Option(help="What the tracker records: light, standard or full.")] = "standard",
    every: Annotated[str, typer.Option(help="Record every so many steps, or auto.")] = "auto",
    save_adapter: Annotated[bool, typer.Option(help="Leave the trained adapters in the run folders.")] = False,
    demo: Annotated[bool, typer.Option(help="Compare the methods of the paper: stands for --methods.")] = False,
) -> None:
    """Train a grid of runs into --out, then print a table over seeds. Start it again to go on where it stopped."""
    from linchain_analysis.training import DEMO_METHODS, Grid, run_grid

    shared: dict[str, Any] = {
        "problem": problem,
        "model": model,
        "data": data,
        "template": template,
        "num_eval": num_eval,
        "num_steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "max_grad_norm": max_grad_norm,
        "dropout": dropout,
        "bf16": bf16,
        "preset": preset,
        "every": int(every) if every.isdigit() else every,
        "save_adapter": save_adapter,
    }
    try:
        if demo and methods is not None:
            raise InputError("--methods", expected="none beside --demo", got=methods, do="leave one of the two out")
        names = DEMO_METHODS if demo else _split(methods, "--methods")
        if seeds < 1:
            raise InputError("--seeds", expected="at least 1", got=str(seeds), do="ask for one or more")
        rates = [] if learning_rates is None else _split(learning_rates, "--learning-rates")
        grid = Grid(
            methods=names, seeds=range(seeds), learning_rates=[_read_rate(rate) for rate in rates], shared=shared
        )
        result = run_grid(grid, out, num_workers=workers)
        for failure in result.failed:
            typer.echo(f"failed: {failure.name}: {failure.error} (the whole of it: {failure.log})", err=True)
        if result.complete:
            Console().print(_tabulate(result.complete))
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{len(result.complete)} complete runs ({result.num_skipped} of them from before) in {out}")
    if result.failed:
        raise typer.Exit(1)


def _split(text: str | None, option: str) -> list[str]:
    parts = [part.strip() for part in (text or "").split(",")]
    if not all(parts):
        raise InputError(
            option, expected="values separated by commas", got=repr(text or ""), do="name at least one, or use --demo"
        )
    return parts


def _read_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError("--learning-rates", expected="numbers", got=repr(text), do="write 0.001 or 1e-3") from error


def _tabulate(folders: Sequence[Path]) -> Table:
    """Return the comparison of methods: of each measure the mean over seeds and its 95 % interval."""
    from linchain_analysis.analysis.summary import summarise_methods
    from linchain_analysis.runs import load_runs

    summary = summarise_methods(load_runs(folders))
    table = Table(title="mean and 95 % interval over seeds", box=SIMPLE_HEAD, leading=1, padding=0, pad_edge=False)
    for heading in ("method", "learning\nrate", "seeds", *_HEADINGS.values()):
        table.add_column(heading, no_wrap=True)
    for (method, rate), rows in summary.groupby(["method", "base_learning_rate"], sort=False):
        values = zip(rows["measure"], rows["mean"], rows["low"], rows["high"], strict=True)
        cells = {measure: _tell_interval(mean, low, high) for measure, mean, low, high in values}
        seeds = str(rows["num_seeds"].max())
        table.add_row(str(method), f"{rate:g}", seeds, *(cells.get(measure, "") for measure in _HEADINGS))
    return table


def _tell_interval(mean: float, low: float, high: float) -> str:
    # One seed, or a run that diverged, leaves no interval.
    return f"{mean:.3g}" if math.isnan(low) else f"{mean:.3g}\n{low:.3g} … {high:.3g}"


if __name__ == "__main__":
    app()
