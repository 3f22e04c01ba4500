"""`python -m linchain_analysis.figures`: draw runs, with what was drawn and where it came from beside every figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from linchain_analysis.errors import InputError, LinchainError

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

_NAMES = ("overview", "loss", "effective-rank", "gradient-norms", "update-norms")
_FORMATS = ("pdf", "png")


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold them.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Some figures, separated by commas: {', '.join(_NAMES)}, or columns by name, such as condition or "
            "participation-ratio."
        ),
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help=f"Formats, separated by commas: {', '.join(_FORMATS)}.")
    ] = "pdf,png",
) -> None:
    """Draw loss, ranks, gradient norms and update norms of RUNS: an overview in --out, each figure in a folder below.

    Every column that a measure recorded is drawn as well, in a folder of its name; other columns are drawn when --only
    names them.

    Beside every figure stand its caption, with how it was averaged and whether it depends on the gauge (caption.txt),
    the numbers that were drawn (drawn.csv), and where they came from (provenance.json).

    Runs of several problems, or of one method at several learning rates, are not drawn together: each comparison gets
    a folder of its own.
    """
    num_figures = 0
    try:
        asked = None if only is None else _split(only)
        for folder in _draw(runs, out, asked, _choose_formats(formats)):
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


def _draw(paths: Sequence[Path], out: Path, asked: Sequence[str] | None, formats: Sequence[str]) -> Iterator[Path]:
    """Draw and save every comparison, and yield the folder of each figure as it is written."""
    # Here and not above: a wrong option should be refused before matplotlib and pandas are loaded.
    from linchain_analysis.analysis.comparisons import split_comparisons
    from linchain_analysis.analysis.provenance import describe_origin, describe_runs
    from linchain_analysis.plots.gallery import draw_gallery, find_figures
    from linchain_analysis.plots.saving import save_figure
    from linchain_analysis.runs import load_runs

    found = load_runs(paths)
    # Only the runs know what may be asked for: somebody's own measure has a figure like any other.
    names = None if asked is None else find_figures(found, asked, "--only")
    unfinished = [
        f"{name} ({run.status})" for run, name in zip(found.runs, found.names, strict=True) if run.status != "complete"
    ]
    if unfinished:
        typer.echo(f"drawn as far as they got: {', '.join(unfinished)}", err=True)
    comparisons = split_comparisons(found.catalogue)
    for comparison in comparisons:
        chosen = load_runs([run for run, name in zip(found.runs, found.names, strict=True) if name in comparison.runs])
        gallery = draw_gallery(chosen, names)
        for reason in _shorten(gallery.left_out, names or ()):
            typer.echo(f"left out: {reason}", err=True)
        home = out / comparison.name if len(comparisons) > 1 else out
        origin = describe_origin(["python", "-m", "linchain_analysis.figures", *sys.argv[1:]], describe_runs(chosen))
        for name, drawn in gallery.figures.items():
            folder = home if name == "overview" else home / name
            save_figure(drawn, folder, origin, formats)
            yield folder


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
