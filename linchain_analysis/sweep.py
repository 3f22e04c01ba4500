"""`python -m linchain_analysis.sweep`: methods × learning rates × seeds.

Fine-tunes on text run in worker processes that stay alive, synthetic maps as stacks of chains in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from linchain_analysis.errors import InputError, LinchainError
from linchain_analysis.method_names import parse_method

if TYPE_CHECKING:
    from linchain_analysis.training import GridResult
    from linchain_analysis.training.synthetic import OptimizerSettings

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
        str | None,
        typer.Option(help="Methods, separated by commas; a map has some of its own if unset, of r = min(8, d)."),
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="Text: sums, which is meant if no --data is given. Synthetic map: " + _MAP_LIST)
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, separated by commas; the problem's own if unset. A map's are 2^-14 … 2^-1 with Adam, "
            "2^-7 … 2^4 with gd and momentum, 2^-3 … 2^8 with these and a quartic loss. In the table of a map a * "
            "marks a best rate at an edge of them, outside which a better one may lie."
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
    measures: Annotated[
        str | None,
        typer.Option(help="Measures to record beside --preset, by name, separated by commas: sgd_identity, …", **_MAP),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="gd, momentum, adam or adamw.", **_MAP)] = "adam",
    weight_decay: Annotated[float | None, typer.Option(help="Of adamw; 0.01 if unset.", **_MAP)] = None,
    dim: Annotated[int, typer.Option(help="Size of inputs and outputs.", **_MAP)] = 64,
    target_rank: Annotated[int, typer.Option(help="Rank of the target.", **_MAP)] = 8,
    spectrum: Annotated[
        str | None,
        typer.Option(
            help="Singular values of the target of the problem spectrum, separated by commas; as many ones as its rank "
            "if unset.",
            **_MAP,
        ),
    ] = None,
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
            "learning_rates": [_read_number(rate, "--learning-rates") for rate in rates],
        }
        recorded: dict[str, Any] = {"preset": preset, "every": int(every) if every.isdigit() else every}
        result: GridResult
        if is_map:
            from linchain_analysis.problems.synthetic import MapSetting
            from linchain_analysis.training.synthetic import DEFAULT_METHODS, MapGrid, run_map_grid

            sigma = None if spectrum is None else _split(spectrum, "--spectrum")
            setting = MapSetting(
                str(problem),
                dim=dim,
                target_rank=target_rank,
                spectrum=None if sigma is None else tuple(_read_number(value, "--spectrum") for value in sigma),
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
                optimizer=_choose_optimizer(optimizer, weight_decay),
                num_steps=800 if steps is None else steps,
                scale=_read_scale(scale),
                measures=[] if measures is None else _split(measures, "--measures"),
                **axes,
                **recorded,
            )
            _tell_wide(map_grid.methods, setting.shape)
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
            from linchain_analysis.analysis.tables import tabulate_maps, tabulate_text
            from linchain_analysis.runs import load_runs

            runs = load_runs(result.complete)
            for part in tabulate_maps(runs) if is_map else [tabulate_text(runs)]:
                Console().print(part)
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    num_runs = f"{len(result.complete)} complete run{'' if len(result.complete) == 1 else 's'}"
    typer.echo(f"{num_runs} ({result.num_skipped} of them from before) in {out}")
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


def _choose_optimizer(name: str, weight_decay: float | None) -> OptimizerSettings:
    from linchain_analysis.training.synthetic import OptimizerSettings

    settings = OptimizerSettings(cast("Any", name))
    if weight_decay is None:
        return settings
    if name != "adamw":
        raise InputError(
            "--weight-decay",
            expected=f"none with the optimiser {name}, which has no weight decay",
            got=f"{weight_decay:g}",
            do="choose --optimizer adamw, or leave it out",
        )
    return replace(settings, weight_decay=weight_decay)


def _tell_wide(methods: Sequence[str], shape: tuple[int, int]) -> None:
    """Say which adapters have more directions than a map has: depth costs less there, and r stands for less."""
    wide = [method for method in methods if parse_method(method).rank > min(shape)]
    if wide:
        size = f"{shape[0]} × {shape[1]}"
        typer.echo(f"note: adapters wider than the map of {size}: {', '.join(wide)} (r > {min(shape)})", err=True)


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


def _read_number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(option, expected="numbers", got=repr(text), do="write 0.001 or 1e-3") from error


if __name__ == "__main__":
    app()
