"""`python -m linchain_analysis.audit`: what finished PEFT adapters changed, and today's measures on earlier runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from linchain_analysis.errors import InputError, LinchainError

if TYPE_CHECKING:
    from linchain_analysis.auditing import Request

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders of adapters, or that hold several; or one run folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables; audit-NAME[-MEASURE] unless given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    list_measures: Annotated[bool, typer.Option("--list", help="Print every measure with its columns.")] = False,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.py",
            help="Of a run: apply this measure to its snapshots, or all that a Python file marks with @measure or "
            "@spectral_measure (the file is run). May be given several times.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, a folder or a hub name: compare with it.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSON file of records, or a text a line: measure the functional rank.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Layout of prompts: plain, alpaca or alpaca-authors.")] = None,
    num_records: Annotated[int | None, typer.Option(help="How many texts of --data to take.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Texts of one forward pass.")] = 16,
    keep: Annotated[float, typer.Option(help="Share of the gain in loss that the functional rank keeps.")] = 0.99,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Take the largest Hessian eigenvalue.")] = False,
    learning_rate: Annotated[float | None, typer.Option(help="Says where the edges of stability lie.")] = None,
    optimizer_state: Annotated[
        Path | None, typer.Option(help="optimizer.pt or safetensors of exp_avg_sq: sharpness as Adam feels it.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many singular vectors of each base weight to know.")] = 64,
    unused_below: Annotated[
        float, typer.Option(help="A module below this share of the median norm is nearly unused.")
    ] = 1e-3,
) -> None:
    """Analyse finished PEFT adapters, or apply measures to the snapshots of a run.

    Exit code 1 says that no delta could be measured, 2 that the command is wrong.
    """
    try:
        if list_measures:
            _print_measures(as_json)
            return
        if not paths:
            raise InputError("audit", expected="a path, or --list", got="none", do="name a folder")
        # Here and not above: a wrong command should be refused before torch and PEFT are loaded.
        from linchain_analysis.auditing import Request, is_run

        if any(is_run(path) for path in paths):
            if model is not None or data is not None or sharpness:
                raise InputError(
                    "--model, --data, --sharpness", expected="an adapter", got="a run", do="name the adapter's folder"
                )
            _audit_run(paths, measure or [], out, as_json)
            return
        if measure:
            raise InputError("--measure", expected="a run folder", got=str(paths[0]), do="name a run")
        request = Request(
            model=model,
            data=data,
            template=template,
            num_records=num_records,
            batch_size=batch_size,
            keep=keep,
            sharpness=sharpness,
            learning_rate=learning_rate,
            optimizer_state=optimizer_state,
            num_base_vectors=top,
            unused_share=unused_below,
        )
        measured = _audit_adapters(paths, request, out, as_json)
    except LinchainError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if not measured:
        raise typer.Exit(1)


def _print_measures(as_json: bool) -> None:
    from linchain_analysis.auditing.choice import RECORDED, recorded_columns
    from linchain_analysis.measures.registry import all_measures

    recorded, measures = recorded_columns(), all_measures()
    if as_json:
        levels = [(name, RECORDED, columns) for name, columns in recorded.items()]
        levels += [(name, found.level, found.columns) for name, found in sorted(measures.items())]
        columns = [
            {"measure": name, "level": level, **{key: getattr(column, key) for key in _COLUMN_KEYS}}
            for name, level, filled in levels
            for column in filled
        ]
        typer.echo(json.dumps(columns, indent=1, ensure_ascii=False))
        return
    from linchain_analysis.auditing.display import measure_list

    _print(measure_list(recorded, measures), False)


_COLUMN_KEYS = ("table", "name", "unit", "meaning", "moment", "gauge_dependent", "source")


def _audit_adapters(paths: Sequence[Path], request: Request, out: Path | None, as_json: bool) -> bool:
    """Audit adapters and return whether any delta was measured."""
    from linchain_analysis.auditing import examine, read_adapters, save_audit
    from linchain_analysis.auditing.display import audit_tables
    from linchain_analysis.auditing.report import refuse_adapter_folder, to_json

    adapters = read_adapters(paths)
    folder = _choose_folder(out, paths[0])
    refuse_adapter_folder(folder, adapters)
    found = examine(adapters, request, say=lambda text: typer.echo(text, err=True))
    written = save_audit(found, folder)
    _print(to_json(found) if as_json else audit_tables(found), as_json)
    _tell(written)
    return bool(len(found.modules)) and not bool((found.modules["state"] == "refused").all())


def _audit_run(paths: Sequence[Path], names: Sequence[str], out: Path | None, as_json: bool) -> None:
    from linchain_analysis.auditing import apply_measures, describe_run
    from linchain_analysis.auditing.display import measured_tables, run_table
    from linchain_analysis.auditing.report import plain_json, records, save_table
    from linchain_analysis.runs import load_run

    if len(paths) > 1:
        raise InputError("audit", expected="one run at a time", got=f"{len(paths)} paths", do="name the run alone")
    run = load_run(paths[0])
    if not names:
        held = describe_run(run)
        _print(plain_json(held) if as_json else run_table(held), as_json)
        return
    tables = apply_measures(run, names)
    folder = _choose_folder(out, paths[0], names)
    if folder.resolve() == paths[0].resolve():
        raise InputError("--out", expected="a folder of its own", got="the run folder", do="choose another")
    written = [save_table(table, folder / f"{name}.parquet", name) for name, table in tables.items()]
    if as_json:
        _print(plain_json({name: records(table) for name, table in tables.items()}), True)
    else:
        width = Console().width
        _print((part for name, table in tables.items() for part in measured_tables(name, table, width)), False)
    _tell(written)


def _choose_folder(out: Path | None, path: Path, measures: Sequence[str] = ()) -> Path:
    from linchain_analysis.auditing import find_free, name_folder

    if out is not None:
        return out
    named = name_folder(path, measures)
    free = find_free(named)
    if free != named:
        typer.echo(f"{named} exists already: writing to {free}", err=True)
    return free


def _print(found: Any | Iterable[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    console = Console(markup=False)
    for part in found:
        console.print(part, highlight=False)


def _tell(written: Iterable[Path]) -> None:
    for path in written:
        typer.echo(f"written: {path}", err=True)


if __name__ == "__main__":
    app()
