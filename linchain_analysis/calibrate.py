"""`python -m linchain_analysis.calibrate`: does the instrument see effects that are known to exist?"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linchain_analysis.errors import LinchainError

if TYPE_CHECKING:
    from linchain_analysis.controls import Control

# The figures and findings that docs/controls.md shows. A call writes elsewhere unless told to, because a rerun would
# change what is kept there, the seconds if nothing else.
KEPT = Path("figures/controls")

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
            help="Folder for the figures and for findings.json; figures/controls renews those of docs/controls.md. "
            "One call at a time: it is changed without a lock."
        ),
    ] = Path("runs/controls"),
) -> None:
    """Reproduce known effects with the measures of this package, and say whether each meets its criterion.

    A null result means something only if the instrument sees effects that are known to exist. Every control has a
    figure in a folder of its name below --out; what all of them found stands in findings.json. All of them take about
    six minutes on two cores, half of it intruders; each says how long it takes before it starts, where that is known.

    Exit code 1 says that a control failed, 2 that the command is wrong, 130 that it was interrupted; what had finished
    by then is kept.
    """
    try:
        # Here and not above: --help should not wait for what the controls load.
        from linchain_analysis.controls.findings import recorded_seconds
        from linchain_analysis.controls.registry import find_controls

        controls = find_controls(names or [])
        if show:
            for control in controls:
                typer.echo(f"{control.name}: {control.title}\n  {control.claim}")
                typer.echo(f"  criterion: {control.criterion}\n  history: {control.history}")
            return
        passed = _calibrate_all(controls, out, recorded_seconds([KEPT, out]))
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{sum(passed)} of {len(passed)} passed")
    if not all(passed):
        raise typer.Exit(1)


def _calibrate_all(controls: Sequence[Control], out: Path, seconds: Mapping[str, float]) -> list[bool]:
    """Run the controls one after another and return which passed; an interrupt says how far that came, and exits."""
    # PEFT asks for a property that transformers deprecates, once per adapted model: pages that would bury the findings.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    passed: list[bool] = []
    try:
        for number, control in enumerate(controls, start=1):
            known = f" (takes about {seconds[control.name]:.0f} s)" if control.name in seconds else ""
            typer.echo(f"{control.name}: {control.title}, {number} of {len(controls)}{known}")
            passed.append(_calibrate(control, out))
    except KeyboardInterrupt:
        all_names, done = [control.name for control in controls], len(passed)
        parts = (all_names[:done], all_names[done : done + 1], all_names[done + 1 :])
        finished, within, left = (", ".join(part) or "none" for part in parts)
        typer.echo(f"stopped; finished: {finished}; stopped in the middle of: {within}; not run: {left}", err=True)
        raise typer.Exit(130) from None
    return passed


def _calibrate(control: Control, out: Path) -> bool:
    """Run one control, write its files, print what it found, and return whether it passed."""
    from linchain_analysis.analysis.provenance import describe_origin
    from linchain_analysis.controls.findings import add_finding, describe_finding
    from linchain_analysis.plots.saving import save_figure

    typer.echo(f"  criterion: {control.criterion}")
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
