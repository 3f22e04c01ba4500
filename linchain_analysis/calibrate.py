"""`python -m linchain_analysis.calibrate`: does the instrument see effects that are known to exist?"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linchain_analysis.errors import LinchainError

if TYPE_CHECKING:
    from linchain_analysis.controls import Control

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Some controls; all of them unless named.")] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Print the controls with their criteria and histories, and end.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the figures and for findings.json. One call at a time: it is changed without a lock."
        ),
    ] = Path("figures/controls"),
) -> None:
    """Reproduce known effects with the measures of this package, and say whether each meets its criterion.

    A null result means something only if the instrument sees effects that are known to exist. Every control has a
    figure in a folder of its name below --out; what all of them found stands in findings.json.

    Exit code 1 says that a control failed, 2 that the command is wrong.
    """
    try:
        # Here and not above: --help should not wait for what the controls load.
        from linchain_analysis.controls.registry import find_controls

        controls = find_controls(names or [])
        if show:
            for control in controls:
                typer.echo(f"{control.name}: {control.title}\n  {control.claim}")
                typer.echo(f"  criterion: {control.criterion}\n  history: {control.history}")
            return
        passed = [_calibrate(control, out) for control in controls]
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{sum(passed)} of {len(passed)} passed")
    if not all(passed):
        raise typer.Exit(1)


def _calibrate(control: Control, out: Path) -> bool:
    """Run one control, write its files, print what it found, and return whether it passed."""
    from linchain_analysis.analysis.provenance import describe_origin
    from linchain_analysis.controls.findings import add_finding, describe_finding
    from linchain_analysis.plots.saving import save_figure

    typer.echo(f"{control.name}: {control.title}\n  criterion: {control.criterion}")
    start = time.perf_counter()
    finding = control.run()
    seconds = time.perf_counter() - start
    found = describe_finding(control, finding, seconds)
    folder = out / control.name
    command = ["python", "-m", "linchain_analysis.calibrate", *sys.argv[1:]]
    origin = {**describe_origin(command, []), "control": _without_values(found)}
    save_figure(finding.drawn, folder, origin)
    add_finding(out, control.name, found)
    verdict = "passed" if finding.passed else "FAILED"
    typer.echo(f"  found: {finding.statement}\n  {verdict} in {seconds:.1f} s, drawn: {folder}")
    return finding.passed


def _without_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure's origin says of its control; the values stand in findings.json."""
    return {name: found[name] for name in ("claim", "source", "criterion", "history")}


if __name__ == "__main__":
    app()
