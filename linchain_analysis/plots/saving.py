"""A drawn figure as files: figure.pdf, figure.png, drawn.csv, caption.txt, provenance.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linchain_analysis.plots.drawn import Drawn

FORMATS = ("pdf", "png")


def save_figure(
    drawn: Drawn, folder: Path, origin: Mapping[str, Any], formats: Sequence[str] = ("pdf", "png")
) -> list[Path]:
    """Write a figure, what was drawn, and where it came from into `folder`, and return the files.

    Args:
        drawn: The figure.
        folder: Made where it is missing; files of the same names are replaced.
        origin: What `describe_origin` said, the same for every figure of one call.
        formats: Of `FORMATS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in formats:
        files.append(folder / f"figure.{kind}")
        files[-1].write_bytes(drawn.render(kind))
    files.append(folder / "drawn.csv")
    # Full precision: the table reads back as the numbers that were drawn.
    drawn.table.to_csv(files[-1], index=False, lineterminator="\n")
    files.append(folder / "caption.txt")
    files[-1].write_text(drawn.caption + "\n", encoding="utf-8")
    content = {
        "caption": drawn.caption,
        **origin,
        "columns": [{key: value for key, value in asdict(column).items() if value != ""} for column in drawn.columns],
    }
    files.append(folder / "provenance.json")
    files[-1].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return files
