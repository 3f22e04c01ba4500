"""The page of columns says what the code defines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from linchain_analysis.vocabulary import COLUMNS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_is_what_the_code_defines_now() -> None:
    # In a process of its own: measures that other tests define are no part of it.
    done = subprocess.run(
        [sys.executable, str(DOCS / "make_columns.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_column_has_its_row() -> None:
    page = (DOCS / "columns.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    rows = {
        (table, line.split("`")[1]): line.replace(r"\|", "").count("|")
        for table, text in sections.items()
        for line in text.splitlines()
        if line.startswith("| `")
    }
    assert {(column.table, column.name) for column in COLUMNS} <= set(rows)
    assert {("modules", "order_ratios"), ("modules", "participation_ratio"), ("steps", "noise_scale")} <= set(rows)
    assert set(rows.values()) == {10}  # nine cells: no meaning has broken its row
