"""Write docs/columns.md, the page of every column of every table, from the definitions in the code.

`python docs/make_columns.py` writes it; with `--check` it is only compared, and exit code 1 says that it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from linchain_analysis import vocabulary
from linchain_analysis.measures.registry import BUILT_IN, NOISE_COLUMNS, all_measures
from linchain_analysis.tracking.presets import PRESETS, select
from linchain_analysis.vocabulary import columns_of, measured_columns

PAGE = Path(__file__).with_name("columns.md")
COMMAND = "python docs/make_columns.py"

TABLES = {
    "steps": "one row per optimiser step, complete whatever `every` is; also holds what `log` added",
    "modules": "one row per recorded step and adapted layer",
    "factors": "one row per recorded step, adapted layer and factor",
    "links": "one row per recorded step, adapted layer and pair of neighbouring factors",
    "evals": "one row per evaluation, split and metric",
}
HEADINGS = ("column", "unit", "kind", "recorded by", "read", "gauge", "meaning", "source")

INTRODUCTION = """<!-- Written by `{command}` from linchain_analysis/vocabulary.py and linchain_analysis/measures. -->

# Columns

Every column of every table of a run: `load_run(path).steps`, `.modules`, `.factors`, `.links`, `.evals`.

{symbols}

Measures write besides: L_i = F_0 … F_{{i-1}} and R_i = F_{{i+1}} … F_{{n+1}} for what stands before and after a factor,
dΔW for the update of delta, G = ∂L/∂ΔW for the gradient of the full weight, P(G) = Σ L_i L_iᵀ G R_iᵀ R_i for the
effective preconditioner, η_i for the learning rate of F_i, W_0 for the base weight.

- **unit**: `1` is a pure number.
- **kind**: `spectrum` is a list of numbers, descending, `values` a list in the order that its meaning says; `key`
  columns tell the rows of a table apart.
- **recorded by**: the cheapest preset of `Tracker` that has the column (`light` ⊂ `standard` ⊂ `full`). *always*: every
  run has it. *by name*: only `Tracker(…, measures=[…])` records it. *on reading*: computed from a stored spectrum when
  `read` asks for it by name.
- **read**: the moment, relative to the optimiser's step.
- **gauge**: whether the column *depends* on the gauge.

Undefined is NaN, never 0. `python -m linchain_analysis.audit --list` prints the measures in a terminal.
"""


def write_page() -> str:
    """Return the page as Markdown."""
    sources: dict[str, int] = {}
    # The symbols are explained where the columns are defined, after the first paragraph.
    _, _, symbols = (vocabulary.__doc__ or "").strip().partition("\n\n")
    parts = [INTRODUCTION.format(command=COMMAND, symbols=symbols)]
    for table, rows in TABLES.items():
        parts += [f"## {table}\n", f"{rows[0].upper()}{rows[1:]}.\n", "\n".join(_table(table, sources)) + "\n"]
    parts += ["## Sources\n", "\n".join(f"{number}. {source}" for source, number in sources.items()) + "\n"]
    return "\n".join(parts)


def _table(table: str, sources: dict[str, int]) -> Iterator[str]:
    yield _row(HEADINGS)
    yield _row(["---"] * len(HEADINGS))
    levels = _levels()
    fixed = columns_of(table)
    added = [column for column in measured_columns(table) if column.name not in {other.name for other in fixed}]
    for column in [*fixed, *added]:
        source = f"[{sources.setdefault(column.source, len(sources) + 1)}](#sources)" if column.source else ""
        yield _row(
            (
                f"`{column.name}`",
                column.unit,
                f"{column.kind}, key" if column.key else column.kind,
                levels.get((table, column.name), "always"),
                column.moment,
                "depends" if column.gauge_dependent else "",
                column.meaning,
                source,
            )
        )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("*", r"\*") for cell in cells) + " |"


def _levels() -> Mapping[tuple[str, str], str]:
    """By table and column what records it, for columns that not every run has."""
    levels: dict[tuple[str, str], str] = {}
    for measure in all_measures().values():
        told = {"named": "by name", "reading": "on reading"}.get(measure.level, measure.level)
        levels.update({(column.table, column.name): told for column in measure.columns})
    levels.update({(column.table, column.name): _first_preset("noise") for column in NOISE_COLUMNS})
    for group in ("cosines", "spectra"):
        preset = _first_preset(group)
        levels.update({(table, name): preset for table in ("modules", "factors") for name in BUILT_IN[group]})
    return levels


def _first_preset(group: str) -> str:
    """The cheapest preset that records `noise`, `cosines` or `spectra`."""
    return next(preset for preset in PRESETS if getattr(select(preset), group))


def main() -> None:
    """Write or check the page."""
    page = write_page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE.name}: expected what the code defines, got something older; run `{COMMAND}`.")
        return
    PAGE.write_text(page, encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
