"""`python -m linchain_analysis.finetune`: train one method on one problem, with the tracker on."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from linchain_analysis.errors import LinchainError

if TYPE_CHECKING:
    from linchain_analysis.runs import Run


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    method: Annotated[str, typer.Option(help="Method, such as lora-16, moslora-16 or linchain-3-16.")],
    out: Annotated[Path, typer.Option(help="Run folder, new or empty.")],
    problem: Annotated[str | None, typer.Option(help="Built-in problem; sums if no --data is given.")] = None,
    model: Annotated[str | None, typer.Option(help="Another base model: a folder or a hub name.")] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON file of records with instruction, input, output and answer.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Layout of the prompts: plain, alpaca or alpaca-authors.")
    ] = None,
    num_eval: Annotated[int | None, typer.Option(help="Held-out records.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    warmup_steps: Annotated[int, typer.Option(help="Steps up to the peak learning rate.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, in place of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records in one forward pass.")] = None,
    accumulation: Annotated[int, typer.Option(help="Forward passes in one optimiser step.")] = 1,
    max_grad_norm: Annotated[float, typer.Option(help="Norm to clip gradients to; 0 for no clipping.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Dropout in front of the adapters.")] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Base weights and autocast in bfloat16.")] = False,
    init_seed: Annotated[int, typer.Option(help="Seed of the adapters' initial factors.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Seed of the order of the records and of dropout.")] = 0,
    preset: Annotated[str, typer.Option(help="What the tracker records: light, standard or full.")] = "standard",
    every: Annotated[str, typer.Option(help="Record every so many steps, or auto.")] = "auto",
    save_adapter: Annotated[bool, typer.Option(help="Leave the trained adapter in the run folder.")] = True,
) -> None:
    """Train one method on one problem and record the run in --out. Unset options are the problem's own."""
    from linchain_analysis.adapters import method_config
    from linchain_analysis.training import FinetuneSettings, finetune
    from linchain_analysis.training.events import RunFinished, RunStarted, RunStepped
    from linchain_analysis.training.preparation import prepare
    from linchain_analysis.training.progress import show_progress

    given: dict[str, Any] = {
        "method": method,
        "problem": problem,
        "model": model,
        "data": data,
        "template": template,
        "num_eval": num_eval,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "num_warmup_steps": warmup_steps,
        "num_steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "max_grad_norm": max_grad_norm,
        "dropout": dropout,
        "bf16": bf16,
        "init_seed": init_seed,
        "data_seed": data_seed,
        "preset": preset,
        "every": int(every) if every.isdigit() else every,
        "save_adapter": save_adapter,
    }
    began = time.monotonic()
    _quieten()
    try:
        settings = FinetuneSettings.from_json(given)
        method_config(settings.method)  # what can be refused should be, before a run is said to have started
        prepared = prepare(settings)
        with show_progress().open(num_runs=1, num_complete=0) as show:
            show(RunStarted(1, method))
            finetune(settings, out, prepared=prepared, on_step=lambda *step: show(RunStepped(1, method, *step)))
            show(RunFinished(1, method, time.monotonic() - began))
        from linchain_analysis.runs import load_run

        run = load_run(out)
        Console().print(_summarise(run))
        own, whole = run.steps["track_seconds"], run.steps["seconds"]
        typer.echo(f"tracking: {1e3 * own.median():.2f} ms a step (median), {own.sum() / whole.sum():.2%} of the time")
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"run folder: {out}")


def _quieten() -> None:
    """Leave the terminal to our own progress: transformers tells of every weight file it opens."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _summarise(run: Run) -> Table:
    """Return what was measured on held-out records before and after training."""
    table = Table("on held-out records", "before", "after")
    evals = run.evals.sort_values("step")
    for (split, metric), group in evals.groupby(["split", "metric"]):
        if metric in ("loss", "accuracy"):
            values = group["value"]
            table.add_row(f"{split} {metric}", f"{values.iloc[0]:.4g}", f"{values.iloc[-1]:.4g}")
    losses = run.steps["loss"]
    table.add_row("training loss (first and last step)", f"{losses.iloc[0]:.4g}", f"{losses.iloc[-1]:.4g}")
    return table


if __name__ == "__main__":
    app()
