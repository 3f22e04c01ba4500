"""`python -m linchain_analysis.figures`: draw runs, with what was drawn and where it came from beside every figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_analysis.errors import InputError, LinchainError

if TYPE_CHECKING:
    from linchain_analysis.plots import Drawn
    from linchain_analysis.runs import RunSet

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

_NAMES = ("overview", "loss", "effective-rank", "gradient-norms", "update-norms")
_SWEEP = "learning-rates"
_FORMATS = ("pdf", "png")


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders that hold them.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Some figures, separated by commas: {', '.join(_NAMES)}, {_SWEEP}, or columns by name, such as "
            "condition or participation-ratio."
        ),
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help=f"Formats, separated by commas: {', '.join(_FORMATS)}.")
    ] = "pdf,png",
    level: Annotated[
        float | None,
        typer.Option(
            help="Level of the loss to which steps are counted in a sweep over learning rates; if unset 0.001 of a "
            "relative loss where some method gets there, else one that every method that learns can reach."
        ),
    ] = None,
    each_rate: Annotated[
        bool, typer.Option("--each-rate", help="Draw a sweep over learning rates as one comparison for each rate.")
    ] = False,
    initialisation: Annotated[
        bool,
        typer.Option(
            "--initialisation",
            help="Draw the conditioning, effective rank and scale of chains as they start, for every init, rank and "
            "length, into --out; needs no RUNS.",
        ),
    ] = False,
) -> None:
    """Draw loss, ranks, gradient norms and update norms of RUNS: an overview in --out, each figure in a folder below.

    Every column that a measure recorded is drawn as well, in a folder of its name; other columns are drawn when --only
    names them.

    Beside every figure stand its caption, with how it was averaged and whether it depends on the gauge (caption.txt),
    the numbers that were drawn (drawn.csv), and where they came from (provenance.json).

    Runs of several problems, or of one method at two or three learning rates, are not drawn together: each comparison
    gets a folder of its own.

    Where some method was run at four learning rates or more, --out gets a figure of all rates instead, with the
    methods at one rate and each at its best; the figures above follow in a folder `best`, each method at its best.
    """
    num_figures = 0
    try:
        asked = None if only is None else _split(only)
        if bool(runs) == initialisation or (initialisation and asked is not None):
            raise InputError(
                "figures",
                expected="RUNS, or --initialisation alone",
                got="neither" if not runs and not initialisation else "--initialisation with RUNS or --only",
                do="name folders of runs, or leave them out",
            )
        chosen = _choose_formats(formats)
        for folder in _draw(runs, out, asked, chosen, level, each_rate) if runs else _draw_initialisation(out, chosen):
            typer.echo(f"drawn: {folder}")
            num_figures += 1
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if not num_figures:
        raise typer.Exit(1)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _choose_formats(text: str) -> list[str]:
    chosen = _split(text)
    for name in chosen:
        if name not in _FORMATS:
            raise InputError(
                "--format", expected=f"names among {', '.join(_FORMATS)}", got=repr(name), do="correct the name"
            )
    return chosen


def _draw(
    paths: Sequence[Path],
    out: Path,
    asked: Sequence[str] | None,
    formats: Sequence[str],
    level: float | None,
    each_rate: bool,
) -> Iterator[Path]:
    """Draw and save every comparison, and yield the folder of each figure as it is written."""
    # Here and not above: a wrong option should be refused before matplotlib and pandas are loaded.
    from linchain_analysis.analysis.provenance import describe_origin, describe_runs
    from linchain_analysis.plots.content import NoValuesError
    from linchain_analysis.plots.gallery import draw_gallery, find_figures
    from linchain_analysis.plots.saving import save_figure
    from linchain_analysis.runs import load_runs

    found = load_runs(paths)
    # Only the runs know what may be asked for: somebody's own measure has a figure like any other.
    names = None if asked is None else find_figures(found, [name for name in asked if name != _SWEEP], "--only")
    unfinished = [
        f"{name} ({run.status})" for run, name in zip(found.runs, found.names, strict=True) if run.status != "complete"
    ]
    if unfinished:
        typer.echo(f"drawn as far as they got: {', '.join(unfinished)}", err=True)
    command = ["python", "-m", "linchain_analysis.figures", *sys.argv[1:]]
    for part, runs, sweep in _split_runs(found, each_rate, asked):
        home = out / part
        told = ""
        if sweep:
            if asked is None or _SWEEP in asked:
                # The overview of a sweep; below `best` stand the figures of its best rates.
                folder = home if asked is None else home / _SWEEP
                try:
                    drawn = _draw_rates(runs, level)
                except NoValuesError as error:
                    typer.echo(f"left out: {error}", err=True)
                else:
                    save_figure(drawn, folder, describe_origin(command, describe_runs(runs)), formats)
                    yield folder
            if names == []:
                continue
            (runs, told), home = _keep_best(runs, level), home / "best"
        origin = describe_origin(command, describe_runs(runs))
        gallery = draw_gallery(runs, names)
        for reason in _shorten(gallery.left_out, names or ()):
            typer.echo(f"left out: {reason}", err=True)
        for name, drawn in gallery.figures.items():
            folder = home if name == "overview" else home / name
            save_figure(replace(drawn, caption=drawn.caption + told), folder, origin, formats)
            yield folder


def _split_runs(found: RunSet, each_rate: bool, asked: Sequence[str] | None) -> Iterator[tuple[str, RunSet, bool]]:
    """Yield the folder below --out of every comparison, its runs, and whether these are a sweep over rates."""
    from linchain_analysis.analysis.comparisons import split_comparisons
    from linchain_analysis.analysis.learning_rates import find_sweeps
    from linchain_analysis.analysis.replication import complete_labels
    from linchain_analysis.runs import load_runs

    catalogue = complete_labels(found.catalogue)
    wanted = asked is not None and _SWEEP in asked
    sweeps = sorted(catalogue["problem"].unique()) if wanted else [] if each_rate else find_sweeps(catalogue)
    swept = catalogue["problem"].isin(sweeps)
    # One rate for each method makes every sweep one comparison, with the name of its problem.
    together = catalogue[swept].assign(base_learning_rate=0.0)
    parts = [(part, True) for part in split_comparisons(together)]
    parts += [(part, False) for part in split_comparisons(catalogue[~swept])]
    for part, sweep in parts:
        runs = [run for run, name in zip(found.runs, found.names, strict=True) if name in part.runs]
        yield part.name if len(parts) > 1 else "", load_runs(runs), sweep


def _draw_rates(runs: RunSet, level: float | None) -> Drawn:
    from linchain_analysis.plots.learning_rates import plot_learning_rates

    return plot_learning_rates(runs, level=level)


def _keep_best(runs: RunSet, level: float | None) -> tuple[RunSet, str]:
    """Return the runs in which each method stands at its best rate, and a sentence that says so."""
    from linchain_analysis.analysis.learning_rates import RULE, at_rates, tune
    from linchain_analysis.runs import load_runs

    best = tune(runs, level)
    rates = dict(zip(best["method"], best["base_learning_rate"], strict=True))
    names = set(at_rates(runs.catalogue, rates)["run"])
    listed = ", ".join(f"{method} {rate:.3g}" for method, rate in rates.items())
    told = f" Each method at its own learning rate: {listed}; {RULE}, chosen on the seeds that are shown."
    return load_runs([run for run, name in zip(runs.runs, runs.names, strict=True) if name in names]), told


def _draw_initialisation(out: Path, formats: Sequence[str]) -> Iterator[Path]:
    """Draw chains as they start, and yield the folder of the figure."""
    from linchain_analysis.analysis.initialisation import measure_initial_chains
    from linchain_analysis.analysis.provenance import describe_origin
    from linchain_analysis.plots.initialisation import plot_initialisation
    from linchain_analysis.plots.saving import save_figure

    origin = describe_origin(["python", "-m", "linchain_analysis.figures", *sys.argv[1:]], [])
    save_figure(plot_initialisation(measure_initial_chains()), out, origin, formats)
    yield out


def _shorten(left_out: Sequence[InputError], named: Sequence[str]) -> Iterator[str]:
    """One line for all columns without values, and one for each other reason; in full for what was asked by name."""
    from linchain_analysis.plots.content import NoValuesError

    empty = [
        error.place for error in left_out if isinstance(error, NoValuesError) and error.place not in (*_NAMES, *named)
    ]
    yield from (str(error) for error in left_out if error.place not in empty)
    if empty:
        yield f"{', '.join(empty)}: no value at any step"


if __name__ == "__main__":
    app()
