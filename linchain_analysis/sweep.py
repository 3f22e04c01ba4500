"""`python -m linchain_analysis.sweep`: methods × learning rates × seeds.

Fine-tunes on text run in worker processes that stay alive, synthetic maps as stacks of chains in threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linchain_analysis.errors import InputError, LinchainError

if TYPE_CHECKING:
    from linchain_analysis.training import GridResult

# Two lines a cell, and headings of two lines: eighty columns hold the table.
_HEADINGS = {"final_loss": "final loss", "accuracy": "accuracy", "final_effective_rank": "final\neffective rank"}


_TEXT_PANEL, _MAP_PANEL = "Text problems", "Synthetic maps"
_TEXT: dict[str, Any] = {"rich_help_panel": _TEXT_PANEL}
_MAP: dict[str, Any] = {"rich_help_panel": _MAP_PANEL}
_TEXT_SEEDS, _MAP_SEEDS = 3, 10
_MAP_LIST = "rotation, shear, shear-rotation, rotation-shear, spectrum."

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of runs; what is complete there is not trained again.")],
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by commas; a map has some of its own if unset.")
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="Text: sums, which is meant if no --data is given. Synthetic map: " + _MAP_LIST)
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, separated by commas; the problem's own if unset. A map's are 2^-14 … 2^-1 with Adam, "
            "2^-7 … 2^4 with gd and momentum."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds: 0, 1, … for initialisation and data alike; 3, of a map 10.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes, or threads for a map; one for each core if unset.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 800 for a map.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Records in one forward pass. Map: fresh inputs at every step.")
    ] = None,
    preset: Annotated[str, typer.Option(help="What is recorded: light, standard or full.")] = "standard",
    every: Annotated[str, typer.Option(help="Record every so many steps, or auto.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Another base model: a folder or a hub name.", **_TEXT)] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON file of records with instruction, input, output and answer.", **_TEXT)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Layout of the prompts: plain, alpaca or alpaca-authors.", **_TEXT)
    ] = None,
    num_eval: Annotated[int | None, typer.Option(help="Held-out records.", **_TEXT)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, in place of --steps.", **_TEXT)] = None,
    accumulation: Annotated[int, typer.Option(help="Forward passes in one optimiser step.", **_TEXT)] = 1,
    max_grad_norm: Annotated[float, typer.Option(help="Norm to clip gradients to; 0 for no clipping.", **_TEXT)] = 1.0,
    dropout: Annotated[float, typer.Option(help="Dropout in front of the adapters.", **_TEXT)] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Base weights and autocast in bfloat16.", **_TEXT)] = False,
    save_adapter: Annotated[bool, typer.Option(help="Leave the trained adapters in the run folders.", **_TEXT)] = False,
    demo: Annotated[
        bool, typer.Option(help="Compare the methods of the paper: stands for --methods.", **_TEXT)
    ] = False,
    optimizer: Annotated[str, typer.Option(help="gd, momentum, adam or adamw.", **_MAP)] = "adam",
    dim: Annotated[int, typer.Option(help="Size of inputs and outputs.", **_MAP)] = 64,
    target_rank: Annotated[int, typer.Option(help="Rank of the target.", **_MAP)] = 8,
    samples: Annotated[
        int | None, typer.Option(help="Training inputs; the expectation over all if unset.", **_MAP)
    ] = None,
    label_noise: Annotated[float, typer.Option(help="Standard deviation of the labels' noise.", **_MAP)] = 0.0,
    input_decay: Annotated[
        float, typer.Option(help="The inputs' covariance has the eigenvalues i^-DECAY; 0 for whitened ones.", **_MAP)
    ] = 0.0,
    observed: Annotated[float, typer.Option(help="Share of the labels' entries that the loss sees.", **_MAP)] = 1.0,
    map_loss: Annotated[str, typer.Option(help="quadratic or quartic.", **_MAP)] = "quadratic",
    scale: Annotated[
        str, typer.Option(help="What multiplies the product of the factors, or alpha for alpha / r = 2.", **_MAP)
    ] = "1",
) -> None:
    """Train a grid of runs into --out, then print a table over seeds. Start it again to go on where it stopped."""
    from linchain_analysis.training import DEMO_METHODS, Grid, run_grid

    try:
        is_map = _is_map(problem)
        _refuse_foreign(context, problem, is_map=is_map)
        if demo and methods is not None:
            raise InputError("--methods", expected="none beside --demo", got=methods, do="leave one of the two out")
        if seeds is not None and seeds < 1:
            raise InputError("--seeds", expected="at least 1", got=str(seeds), do="ask for one or more")
        rates = [] if learning_rates is None else _split(learning_rates, "--learning-rates")
        axes: dict[str, Any] = {
            "seeds": range(seeds or (_MAP_SEEDS if is_map else _TEXT_SEEDS)),
            "learning_rates": [_read_rate(rate) for rate in rates],
        }
        recorded: dict[str, Any] = {"preset": preset, "every": int(every) if every.isdigit() else every}
        result: GridResult
        if is_map:
            from linchain_analysis.problems.synthetic import MapSetting
            from linchain_analysis.training.synthetic import DEFAULT_METHODS, MapGrid, OptimizerSettings, run_map_grid

            setting = MapSetting(
                str(problem),
                dim=dim,
                target_rank=target_rank,
                num_samples=samples,
                batch_size=batch_size,
                label_noise=label_noise,
                input_decay=input_decay,
                observed=observed,
                loss=cast("Any", map_loss),
            )
            map_grid = MapGrid(
                setting,
                DEFAULT_METHODS if methods is None else _split(methods, "--methods"),
                optimizer=OptimizerSettings(cast("Any", optimizer)),
                num_steps=800 if steps is None else steps,
                scale=_read_scale(scale),
                **axes,
                **recorded,
            )
            result = run_map_grid(map_grid, out, num_threads=workers)
        else:
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
                "save_adapter": save_adapter,
            }
            names = DEMO_METHODS if demo else _split(methods, "--methods")
            result = run_grid(Grid(methods=names, shared={**shared, **recorded}, **axes), out, num_workers=workers)
        for failure in result.failed:
            whole = f" (the whole of it: {failure.log})" if failure.log else ""
            typer.echo(f"failed: {failure.name}: {failure.error}{whole}", err=True)
        if result.complete:
            for part in _tabulate_maps(result.complete) if is_map else [_tabulate(result.complete)]:
                Console().print(part)
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{len(result.complete)} complete runs ({result.num_skipped} of them from before) in {out}")
    if result.failed:
        raise typer.Exit(1)


def _is_map(problem: str | None) -> bool:
    """Whether a problem is a synthetic map; an unknown one is refused here, since only the door knows both kinds."""
    from linchain_analysis.problems import PROBLEM_NAMES
    from linchain_analysis.problems.synthetic import MAP_NAMES

    if problem is None or problem in PROBLEM_NAMES:
        return False
    if problem in MAP_NAMES:
        return True
    close = get_close_matches(problem, [*PROBLEM_NAMES, *MAP_NAMES], n=1)
    raise InputError(
        "problem",
        expected=f"one of {', '.join(PROBLEM_NAMES)} (text) or {', '.join(MAP_NAMES)} (synthetic maps)",
        got=repr(problem),
        do=f"did you mean {close[0]!r}?" if close else "choose one of them",
    )


def _refuse_foreign(context: typer.Context, problem: str | None, *, is_map: bool) -> None:
    """Refuse options that belong to the other kind of problem, whatever they say."""
    foreign = _TEXT_PANEL if is_map else _MAP_PANEL
    kind = f"{problem} (a synthetic map)" if is_map else f"{problem or 'text'} (no synthetic map)"
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if (
            source is not None
            and source.name == "COMMANDLINE"
            and getattr(parameter, "rich_help_panel", None) == foreign
        ):
            option = parameter.opts[0]
            raise InputError(
                option,
                expected=f"none with the problem {kind}",
                got="one",
                do=f"leave it out: it is for {foreign[0].lower()}{foreign[1:]}",
            )


def _read_scale(text: str) -> float | None:
    if text == "alpha":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InputError("--scale", expected="a number or alpha", got=repr(text), do="write 1 or alpha") from error


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


def _tabulate_maps(folders: Sequence[Path]) -> list[Table | str]:
    """Return each method at its best learning rate, and by what rule that was chosen."""
    from linchain_analysis.analysis.learning_rates import RELATIVE_LEVEL, RULE, tune
    from linchain_analysis.runs import load_runs

    best = tune(load_runs(folders), RELATIVE_LEVEL, "relative_loss")
    table = Table(title="each method at its best learning rate", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    level = f"{RELATIVE_LEVEL:g}"
    for heading in ("method", "learning rate", "seeds", "final relative loss", f"reached {level}", "at step"):
        table.add_column(heading, no_wrap=True)
    for row in best.to_dict("records"):
        table.add_row(
            str(row["method"]),
            f"{row['base_learning_rate']:.4g}" + ("*" if row["edge"] in ("smallest", "largest") else ""),
            str(row["num_seeds"]) + (f" ({row['num_diverged']} not finite)" if row["num_diverged"] else ""),
            f"{row['final_loss']:.3g}" if math.isfinite(row["final_loss"]) else "not finite",
            f"{row['num_reached'] / row['num_seeds']:.0%}",
            f"{row['median']:g}" if math.isfinite(row["median"]) else "",
        )
    notes = (
        f"Medians over seeds; of a run that did not reach {level} as if it did so at infinity. The best rate is {RULE}."
        " It was chosen on the seeds that are shown, which flatters every method."
    )
    if best["edge"].isin(["smallest", "largest"]).any():
        notes += " *: the smallest or largest that was tried, so a better one may lie outside."
    return [table, notes]


def _tell_interval(mean: float, low: float, high: float) -> str:
    # One seed, or a run that diverged, leaves no interval.
    return f"{mean:.3g}" if math.isnan(low) else f"{mean:.3g}\n{low:.3g} … {high:.3g}"


if __name__ == "__main__":
    app()
