"""`python -m linchain_analysis.watch RUN`: see how runs get on, in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders that hold them.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and end; always so where stdout is no terminal.")
    ] = False,
    refresh: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show loss, effective rank, update ratios, health and progress of RUNS while they are written.

    It can be started before, during and after a training, only reads, and ends with the last run or at Ctrl-C.
    """
    try:
        ended = _show(runs, refresh, once=once)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    raise typer.Exit(0 if ended else 2)


def _show(runs: list[Path], refresh: float, *, once: bool) -> bool:
    # Here and not above: --help and wrong options are answered before tables can be read.
    from rich.console import Console

    from linchain_analysis.errors import LinchainError
    from linchain_analysis.watching.showing import show_live, show_once

    console = Console(highlight=False)
    try:
        if once or not sys.stdout.isatty():  # rich takes a log for a terminal where colours are forced
            return show_once(runs, console)
        return show_live(runs, console, refresh)
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
