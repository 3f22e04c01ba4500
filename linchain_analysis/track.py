"""`python -m linchain_analysis.track [--out DIR] SCRIPT [ARGS…]`: track an unchanged training script."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from linchain_analysis.errors import LinchainError
from linchain_analysis.tracking.launcher import Recording, check, launch
from linchain_analysis.tracking.presets import SAMPLE_EVERY

app = typer.Typer(add_completion=False, context_settings={"allow_interspersed_args": False})


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    target: str
    arguments: list[str]
    is_module: bool
    out: Path | None
    recording: Recording


_REQUESTS: list[Request] = []


@app.command()
def parse(
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help="The script, or with -m the module, to run.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Passed on as they are.")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/SCRIPT-TIME if it is not given.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="light (norms), standard (and spectra, cosines; the default) or full (every measure, snapshots)."
        ),
    ] = None,
    every: Annotated[str, typer.Option(help='Record each N-th step whole, or "auto" to stay under 200 MB.')] = "auto",
    include: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Record only modules in whose name it is found.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Leave out modules in whose name it is found.")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="tensorboard|wandb|trackio", help="Mirror the scalars there; may be given several times."),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas, in place of a preset or beside it; linchain_analysis.audit --list."
        ),
    ] = None,
    sample_every: Annotated[int, typer.Option(help="Steps between two samples of the dear measures.")] = SAMPLE_EVERY,
    snapshot_every: Annotated[
        int | None, typer.Option(help="Steps between two snapshots of the small cores; 50 for full, else none.")
    ] = None,
    resume: Annotated[
        int | None,
        typer.Option(
            metavar="STEP",
            help="Go on with the run in --out after this step. Only for optimisers that keep no count of their steps, "
            "such as plain SGD; otherwise a training resumed from a checkpoint is recognised.",
        ),
    ] = None,
) -> None:
    """Run SCRIPT unchanged and record what its optimiser does to the adapted layers."""
    chosen = None if measures is None else tuple(name.strip() for name in measures.split(","))
    recording = Recording(preset, every, chosen, sample_every, snapshot_every, include, exclude, tuple(report_to or ()))
    _REQUESTS.append(Request(target, arguments or [], is_module, out, recording))


def main() -> None:
    """Parse the command line and run the script."""
    # Parsed here and run below, so that the script's interrupts and exceptions never pass through the parser.
    try:
        typer.main.get_command(app)()
    except SystemExit:
        if not _REQUESTS:  # --help, or a mistake that has been said
            raise
    request = _REQUESTS.pop()
    try:
        check(request.target, is_module=request.is_module, out=request.out, recording=request.recording)
    except LinchainError as error:
        print(f"linchain_analysis: {error}", file=sys.stderr)
        sys.exit(2)
    launch(
        request.target,
        request.arguments,
        is_module=request.is_module,
        out=request.out,
        recording=request.recording,
    )


if __name__ == "__main__":
    main()
