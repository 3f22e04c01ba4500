"""What an audit found, as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from linchain_analysis.auditing.choice import RECORDED
from linchain_analysis.auditing.curvature import CAVEAT, Sharpness
from linchain_analysis.auditing.report import Audit, describe_adapter
from linchain_analysis.auditing.truncation import FunctionalRank
from linchain_analysis.measures.registry import Measure
from linchain_analysis.vocabulary import Column

Shown = Table | Group | Text | Padding | str
MAX_ROWS = 60  # of a table of modules; more are shown by kind only

# Headings of one or two short words: eighty columns hold a table.
_MODULES = {
    "delta_spectral_norm": "σ₁",
    "delta_norm": "‖ΔW‖",
    "effective_rank": "eff.\nrank",
    "stable_rank": "stable\nrank",
    "participation_ratio": "part.\nratio",
    "numerical_rank": "num.\nrank",
    "chain_condition": "cond.",
}
_BASE = {
    "relative_delta": "‖ΔW‖\n/‖W₀‖",
    "relative_spectral_norm": "σ₁\n/σ₁",
    "input": "input\n(chance)",
    "output": "output\n(chance)",
    "amplification": "ampli-\nfied",
    "intruders": "intru-\nders",
}
_KINDS = {
    "kind": "kind",
    "modules": "mod-\nules",
    "unused": "un-\nused",
    "total_norm": "‖ΔW‖\nall",
    "median_delta_norm": "‖ΔW‖",
    "median_effective_rank": "eff.\nrank",
    "median_stable_rank": "stable\nrank",
    "median_participation_ratio": "part.\nratio",
    "median_numerical_rank": "num.\nrank",
}
_OVERLAPS = {
    "kind": "kind",
    "side": "side",
    "similarity": "φ",
    "similarity_by_chance": "(by\nchance)",
    "smallest_angle": "smallest\nangle\n(degrees)",
    "largest_angle": "largest\nangle\n(degrees)",
}


def audit_tables(audit: Audit) -> Iterator[Shown]:
    """Yield what to print, in order."""
    yield _adapters(audit)
    yield from (f"note: {note}" for note in audit.notes)
    for adapter, group in audit.kinds.groupby("adapter", sort=False) if len(audit.kinds) else ():
        yield _frame(f"{adapter}: by kind (medians over the modules that are used)", group, _KINDS)
    if len(audit.kinds):
        yield "‖ΔW‖ all: √Σ‖ΔW‖² over all modules of the kind"
    if len(audit.modules):
        yield from _modules(audit.modules)
    if len(audit.overlaps):
        yield from _overlaps(audit.overlaps)
    yield from (text for name, rank in audit.functional_ranks.items() for text in _functional_rank(name, rank))
    if audit.sharpness:
        yield from _sharpness(audit.sharpness)


def measure_list(recorded: Mapping[str, Sequence[Column]], measures: Mapping[str, Measure]) -> Iterator[Shown]:
    """Yield what the tracker records by itself and every measure with its level, each with its columns below it."""
    for name, columns in recorded.items():
        yield from _described(f"{name} ({RECORDED})", columns)
    for name, measure in sorted(measures.items()):
        level = f"{measure.level}, sampled" if measure.sampled else measure.level
        yield from _described(f"{name} ({level})", measure.columns)


def _described(title: str, columns: Iterable[Column]) -> Iterator[Shown]:
    """A title, and below it columns with unit and meaning."""
    yield Text(title, style="bold")
    for column in columns:
        text = Text(f"{column.table}.{column.name} [{column.unit}] ")
        yield Padding(text.append(column.meaning, style="dim"), (0, 0, 0, 2))


def run_table(found: Mapping[str, Any]) -> Iterator[Shown]:
    """Yield what a run holds."""
    table = Table("run", str(found["path"]), box=SIMPLE_HEAD)
    for name in ("method", "problem", "status", "preset", "steps", "recorded_steps"):
        if found[name] is not None:
            table.add_row(name.replace("_", " "), str(found[name]))
    steps = found["snapshots"]
    table.add_row("snapshots", f"{len(steps)}, steps {steps[0]} to {steps[-1]}" if steps else "none")
    for name, columns in found["columns"].items():
        if columns:
            table.add_row(f"columns of {name}", ", ".join(columns))
    yield table
    for name, title in (("last_effective_ranks", "effective rank"), ("last_delta_norms", "‖ΔW‖")):
        if found[name]:
            last = Table("module", f"{title} at the last step", box=SIMPLE_HEAD)
            for module, value in list(found[name].items())[:MAX_ROWS]:
                last.add_row(module, _number(value))
            yield last


def measured_tables(name: str, table: pd.DataFrame, width: int) -> Iterator[Shown]:
    """Yield the rows of the last step, at most `MAX_ROWS`, in as many tables as `width` characters ask for."""
    whole = table[table["step"] == table["step"].max()]
    last = whole.head(MAX_ROWS).drop(columns="step")
    prefix = _common_prefix(last["module"])
    if prefix:
        yield f"modules below: {prefix}…"
    last = last.assign(module=[str(module).removeprefix(prefix) for module in last["module"]])
    title = f"{name}, step {table['step'].max()} (of {table['step'].nunique()})"
    headings = {str(column): str(column).replace("_", "\n") for column in last.columns}
    keys = {column: heading for column, heading in headings.items() if column in ("module", "factor", "link")}
    room = width - sum(_width(last[column], heading) for column, heading in keys.items())
    parts: list[dict[str, str]] = []
    left = 0
    for column, heading in headings.items():
        if column in keys:
            continue
        needed = _width(last[column], heading)
        if not parts or needed > left:
            parts.append(dict(keys))
            left = room
        parts[-1][column] = heading
        left -= needed
    yield from (_frame(title, last, part) for part in parts)
    if len(whole) > MAX_ROWS:
        yield f"{MAX_ROWS} of {len(whole)} rows: see the Parquet file for each of them"


def _width(values: pd.Series[Any], heading: str) -> int:
    """Characters that a column takes, with the gap behind it; lists fold at 40."""
    cells = [min(40, len(_cell(value))) if np.ndim(value) else len(_cell(value)) for value in values]
    return max([*cells, *map(len, heading.split("\n"))]) + 2


def _adapters(audit: Audit) -> Table:
    table = Table("adapter", "method", "modules", "parameters", "delta", box=SIMPLE_HEAD)
    for adapter in audit.adapters:
        said = describe_adapter(adapter)
        state = "refused" if said["refused"] else "and more changed" if said["others"] else "measured"
        cells = (said["method"], said["modules"], said["parameters"], state)
        table.add_row(adapter.name, *(str(cell) for cell in cells))
    return table


def _modules(modules: pd.DataFrame) -> Iterator[Shown]:
    unused = modules[modules["state"].isin(["unused", "nearly unused", "not finite"])]
    for _, row in unused.iterrows():
        yield f"{row['state']}: {row['module']} of {row['adapter']}"
    if len(modules) > MAX_ROWS:
        yield f"{len(modules)} modules: see the Parquet file for each of them"
        return
    prefix = _common_prefix(modules["module"])
    if prefix:
        yield f"modules below: {prefix}…"
    modules = modules.assign(module=[str(name).removeprefix(prefix) for name in modules["module"]])
    for adapter, group in modules.groupby("adapter", sort=False):
        measured = group[group["spectrum"].notna()]
        if len(measured):
            yield _frame(f"{adapter}: delta", measured, {"module": "module", **_MODULES})
            yield _frame(f"{adapter}: σ of delta", measured, {"module": "module", "spectrum": "σ"})
        if len(measured) and "relative_delta" in measured:
            yield _frame(f"{adapter}: delta and W₀", _base_cells(measured), {"module": "module", **_BASE})
        refused = group[group["product_spectrum"].notna()]
        if len(refused):
            title = f"{adapter}: the saved product, which is NOT delta"
            yield _frame(title, refused, {"module": "module", "product_spectrum": "σ of the product"})


def _base_cells(measured: pd.DataFrame) -> pd.DataFrame:
    """Put numbers that belong together into one cell."""
    cells = {
        side: [
            f"{value:.2f} ({chance:.2f})"
            for value, chance in zip(measured[column], measured[f"{column}_by_chance"], strict=True)
        ]
        for side, column in (("input", "base_alignment_left"), ("output", "base_alignment_right"))
    }
    bounds = zip(measured["intruders_lower"], measured["intruders_upper"], strict=True)
    cells["intruders"] = [f"{_number(low)}–{_number(high)}" for low, high in bounds]
    return measured.assign(**cells)


def _common_prefix(names: Iterable[Any]) -> str:
    """The parts of dotted names that all of them begin with."""
    parts = [str(name).split(".")[:-1] for name in names]
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))]
    return "".join(f"{part}." for part in shared)


def _overlaps(overlaps: pd.DataFrame) -> Iterator[Shown]:
    """Means over the modules of each pair, kind and side."""
    for (one, two), group in overlaps.groupby(["adapter_1", "adapter_2"], sort=False):
        values = ["similarity", "similarity_by_chance", "smallest_angle", "largest_angle"]
        means = group.groupby(["kind", "side"], sort=False)[values].mean().reset_index()
        yield _frame(f"{one} and {two}: singular subspaces of delta, means over modules", means, _OVERLAPS)


def _functional_rank(name: str, found: FunctionalRank) -> Iterator[Shown]:
    table = Table("k", "loss", "share of the gain", box=SIMPLE_HEAD)
    for k, loss in found.losses.items():
        share = (found.base_loss - loss) / found.gain if found.gain > 0 else math.nan
        table.add_row(str(k), f"{loss:.6g}", f"{share:.2%}")
    table.add_row("all", f"{found.adapted_loss:.6g}", f"{1:.2%}")
    yield Group(Text(f"{name}: truncated to rank k", style="bold"), table)
    if math.isnan(found.rank):
        yield f"{name}: no gain (loss {found.base_loss:.6g} without, {found.adapted_loss:.6g} with the adapter)"
    else:
        yield f"{name}: functional rank {found.rank:.0f} keeps {found.keep:.0%} of the gain, {found.gain:.4g} nats"


def _sharpness(found: Mapping[str, Sharpness]) -> Iterator[Shown]:
    table = Table(
        "adapter", "raw\nsharpness", "edge of\ngradient descent", "preconditioned\nsharpness", "edge of\nAdam",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for name, value in found.items():
        cells = (value.raw, value.gradient_descent_edge, value.preconditioned, value.adam_edge)
        table.add_row(name, *(_number(cell) for cell in cells))
    yield table
    yield CAVEAT


def _frame(title: str, frame: pd.DataFrame, columns: Mapping[str, str] | None = None) -> Group:
    """The columns of a frame, under the headings given or under their own names."""
    named = columns or {str(name): str(name).replace("_", " ") for name in frame.columns}
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name, heading in named.items():
        table.add_column(heading, no_wrap=name in ("kind", "module"), overflow="fold")
    for values in zip(*(frame[name] for name in named), strict=True):
        table.add_row(*(_cell(value) for value in values))
    return Group(Text(title, style="bold"), table)  # a table's own title wraps at its width


def _cell(value: Any) -> str:
    if isinstance(value, (np.ndarray, list, tuple)):
        return _spectrum(value)
    return _number(value) if isinstance(value, (int, float, np.number)) else str(value)


def _spectrum(values: Any, shown: int = 5) -> str:
    head = " ".join(_number(value) for value in values[:shown])
    return head if len(values) <= shown else f"{head} … {_number(values[-1])}"


def _number(value: Any) -> str:
    number = float(value)
    return "–" if math.isnan(number) else f"{number:.3g}" if abs(number) < 1e4 else f"{number:.2e}"
