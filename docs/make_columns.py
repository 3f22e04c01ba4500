"""Write docs/columns.md, the page of every column of every table, from the definitions in the code.

`python docs/make_columns.py` writes it; with `--check` it is only compared, and exit code 1 says that it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from linchain_analysis import vocabulary
from linchain_analysis.measures.registry import BUILT_IN, MAP_COLUMNS, NOISE_COLUMNS, all_measures
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
HEADINGS = ("column", "unit", "kind", "recorded by", "read", "made of", "gauge", "meaning", "source")

SETUPS_ANCHOR = "under-accumulation-clipping-scaling-and-sharding"
SETUPS_INTRODUCTION = """## Under accumulation, clipping, scaling and sharding

What a number means does not change with the setup it was taken in. Under data parallelism (DDP, FSDP2) every process
takes part and the first one writes: each number is that of the same global batch on one process.
"""
# Per basis: moment, accumulation, clipping, scaling, sharding.
SETUPS: Mapping[str, tuple[str, str, str, str, str]] = {
    "factors": (
        "when the optimiser's step has ended",
        "once a step, not once a backward pass",
        "as the clipped step left them",
        "as they are; a step that was left out changes nothing",
        "gathered from all shards; the same on every process of DDP",
    ),
    "update": (
        "factors are copied just before the optimiser's step and read just after it",
        "of the whole step",
        "of the step that was taken, with clipped gradients",
        "0 in a step that was left out",
        "gathered from all shards, before and after the step",
    ),
    "gradient": (
        "at the first clipping after the last backward pass, without clipping just before the step",
        "of the sum over all backward passes of the step",
        "before it: what clipping multiplied is in `clip_coef`",
        "divided by the scale where the script has not done that yet; Inf or NaN where the scaler found that",
        "averaged over processes by DDP or FSDP itself, then gathered from all shards",
    ),
    "gradient and update": (
        "both as above",
        "of the whole step",
        "gradients before it, update of the clipped step",
        "NaN in a step that was left out, whose update is 0",
        "gathered from all shards",
    ),
    "loss": (
        "as each backward pass begins",
        "sum over the backward passes of the step: the mean, where the script divides by their number",
        "no part in it",
        "without the scale",
        "mean over processes",
    ),
    "learning rate": (
        "just before the optimiser's step",
        "of the step",
        "no part in it",
        "that of the step that was left out, too",
        "the same on every process",
    ),
    "clipping": (
        "as gradients are clipped",
        "of the whole step",
        "the factor itself; several clippings of the same parameters multiply, of others the smallest stands",
        "of unscaled gradients if the script unscales first; otherwise of scaled ones, as the script clips",
        "by the global norm, as the script computes it",
    ),
    "scaler": (
        "when the optimiser's step has ended or was left out",
        "of the whole step",
        "no part in it",
        "true where it found Inf or NaN in a gradient",
        "true where any process found it",
    ),
    "tokens": (
        "in the last forward and backward pass before a sampled step",
        "of the last backward pass alone",
        "before it",
        "without the scale",
        "left out (NaN) with several processes, of which each sees its own tokens only",
    ),
    "noise": (
        "after the first backward pass of a step, and with its gradient",
        "what it is made from; NaN in a step of one backward pass",
        "before it",
        "without the scale",
        "left out (NaN) with several processes",
    ),
    "trainer": (
        "after the step, from the Trainer or from `log`",
        "as it counts",
        "no part in it",
        "as it counts",
        "as it counts, over all processes",
    ),
    "clock": (
        "when the step's rows are written",
        "from the end of one step to the end of the next",
        "included",
        "a step that was left out has its own row",
        "of the first process; waiting for others included",
    ),
    "evaluation": (
        "when the Trainer or `log_eval` says it",
        "no part in it",
        "no part in it",
        "no part in it",
        "as the script computes it, on the first process",
    ),
    "map": (
        "when the step has ended, of ΔW as it is then",
        "no part in it",
        "no part in it",
        "no part in it",
        "no part in it: synthetic maps are trained in one process",
    ),
}

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
  `read` asks for it by name. *maps*: every run of a synthetic map has it, and no other.
- **read**: the moment, relative to the optimiser's step.
- **made of**: what it is computed from; [the next table](#{anchor})
  says what that means under accumulation, clipping, scaling and sharding.
- **gauge**: whether the column *depends* on the gauge.

`steps` and `evals` are stored in float64, everything else in float32: what is smaller than about 1e-45 reads as 0
there, and what is larger than 3e38 as Inf. Undefined is NaN, never 0. `python -m linchain_analysis.audit --list`
prints the measures in a terminal.
"""


def write_page() -> str:
    """Return the page as Markdown."""
    sources: dict[str, int] = {}
    # The symbols are explained where the columns are defined, after the first paragraph.
    _, _, symbols = (vocabulary.__doc__ or "").strip().partition("\n\n")
    parts = [INTRODUCTION.format(command=COMMAND, symbols=symbols, anchor=SETUPS_ANCHOR)]
    parts += [SETUPS_INTRODUCTION, "\n".join(_setups()) + "\n"]
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
                "" if column.key else column.basis,
                "depends" if column.gauge_dependent else "",
                column.meaning,
                source,
            )
        )


def _setups() -> Iterator[str]:
    yield _row(("made of", "moment", "accumulation", "clipping", "scaling (GradScaler)", "sharding, data parallel"))
    yield _row(["---"] * 6)
    for basis in get_args(vocabulary.Basis):
        yield _row((basis, *SETUPS[basis]))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("*", r"\*") for cell in cells) + " |"


def _levels() -> Mapping[tuple[str, str], str]:
    """By table and column what records it, for columns that not every run has."""
    levels: dict[tuple[str, str], str] = {}
    for measure in all_measures().values():
        told = {"named": "by name", "reading": "on reading"}.get(measure.level, measure.level)
        levels.update({(column.table, column.name): told for column in measure.columns})
    levels.update({(column.table, column.name): _first_preset("noise") for column in NOISE_COLUMNS})
    levels.update({(column.table, column.name): "maps" for column in MAP_COLUMNS})
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
