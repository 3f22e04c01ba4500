"""What a positive control is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from linchain_analysis.plots.drawn import Drawn


@dataclass(frozen=True)
class Finding:
    """What one control measured, and whether that meets its criterion.

    Attributes:
        passed: Whether it does.
        statement: What was measured, as sentences whose numbers come from `measured` or `table`.
        measured: The numbers that the criterion judges and those that the statement adds, by name. NaN where one is
            undefined, which passes nothing that is judged.
        table: What is drawn, one row per run or point.
        drawn: The figure.
    """

    passed: bool
    statement: str
    measured: Mapping[str, float]
    table: pd.DataFrame
    drawn: Drawn


@dataclass(frozen=True)
class Control:
    """One effect that is known to exist.

    Attributes:
        name: Words in small letters joined by hyphens; the folder of its results.
        title: A few words.
        claim: What the source says, one sentence.
        source: Citation with the arXiv identifier.
        criterion: When the effect counts as seen, one sentence with its numbers. It stands in the code and is the same
            at every run; `history` says what had been seen before it was written.
        history: What was tried before, and what of criterion or settings was changed after results had been seen:
            "Nothing was changed after first results." where that is so.
        run: Computes, judges and draws; the same numbers at every call on one machine.
    """

    name: str
    title: str
    claim: str
    source: str
    criterion: str
    history: str
    run: Callable[[], Finding]
