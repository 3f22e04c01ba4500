"""Write the rows that `python -m linchain_analysis.bench --json ROWS` measured into the README's table of costs.

python docs/fill_cost_table.py ROWS.json [README.md]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- cost: written by docs/fill_cost_table.py -->", "<!-- /cost -->"
UNITS = {"ratio": "×", "milliseconds": " ms", "seconds": " s", "bytes": " bytes", "copies": " copies"}


def make_table(rows: list[dict]) -> str:
    """Return the rows with a target as a Markdown table, and the machine they were measured on."""
    lines = ["| what | median | quartiles | target | met |", "|---|---|---|---|---|"]
    for row in rows:
        if row["target"] is None:
            continue
        unit = "" if row["name"].endswith("/slope") else UNITS.get(row["unit"], f" {row['unit']}")
        low, high = tell(row["ratio_q25"]), tell(row["ratio_q75"])
        quartiles = "" if low == high else f"{low} … {high}"
        met = "yes" if row["met"] else "**missed**"
        lines.append(
            f"| `{row['name']}` | {tell(row['ratio_median'])}{unit} | {quartiles} | ≤ {tell(row['target'])} | {met} |"
        )
    growth = [row for row in rows if row["name"].startswith("growth/") and row["unit"] == "milliseconds"]
    if growth:
        lines += ["", "The tracker's milliseconds a step (`standard`, gradients given), one size varied at a time:", ""]
        lines += ["| " + " | ".join(row["name"].removeprefix("growth/").replace("/", " ") for row in growth) + " |"]
        lines += ["|" + "---|" * len(growth), "| " + " | ".join(tell(row["ratio_median"]) for row in growth) + " |"]
    for row in rows:
        told = (row["name"], tell(row["ratio_median"]), tell(row["ratio_q25"]), tell(row["ratio_q75"]))
        if row["name"].startswith("tracker/none/"):
            lines += ["", "Untracked over untracked, the noise of such ratios (`{}`): {}×, {} … {}.".format(*told)]
        elif row["name"].endswith("/cpu-share"):
            lines += ["", "The tracker's own CPU time beside that of the step (`{}`): {}×, {} … {}.".format(*told)]
    machines = sorted({row["machine"] for row in rows})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}."])


def tell(value: float) -> str:
    """Four digits, so that what just misses its target looks different from it; whole numbers as they are."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    """Replace what stands between the two marks."""
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page = Path(sys.argv[2] if len(sys.argv) > 2 else "README.md")
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{make_table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
