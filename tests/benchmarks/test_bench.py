"""The door `python -m linchain_analysis.bench`. What it measures is not judged here: timings say nothing in a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from linchain_analysis.bench import app
from linchain_analysis.benchmarks.topics import TOPICS

NAMES = [topic.name for topic in TOPICS]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "linchain_analysis.bench", *map(str, arguments)], capture_output=True, text=True
    )


def check_rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        assert {"name", "ratio_median", "ratio_q25", "ratio_q75", "target", "met", "unit"} <= set(row)
        if row["target"] is None:
            assert row["met"] is None
        else:
            assert isinstance(row["ratio_median"], float)
            assert row["met"] is (row["ratio_median"] <= row["target"])
        if row["ratio_median"] is not None:
            assert row["ratio_q25"] <= row["ratio_q75"]
    assert len({row["name"] for row in rows}) == len(rows)
    return rows


def test_topics_are_listed_without_measuring() -> None:
    done = CliRunner().invoke(app, ["--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


def test_unknown_topics_and_devices_are_refused_by_name() -> None:
    wrong = CliRunner().invoke(app, ["--only", "growth,spede"])
    assert wrong.exit_code == 2
    assert f"--only: expected topics among {', '.join(NAMES)}, got 'spede'" in wrong.stderr
    wrong = CliRunner().invoke(app, ["--device", "tpu"])
    assert wrong.exit_code == 2
    assert "--device: expected cpu or cuda, got 'tpu'" in wrong.stderr


@pytest.mark.slow
def test_quick_growth_with_its_rows_and_figure(tmp_path: Path) -> None:
    done = bench("--quick", "--only", "growth", "--json", tmp_path / "rows.json", "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.splitlines()[0]
    assert "missed" not in done.stdout  # small sizes are not judged
    assert "targets met" not in done.stdout
    rows = check_rows(tmp_path / "rows.json")
    assert [row["name"] for row in rows if row["target"] is not None] == [
        "growth/modules/slope",
        "growth/hidden/slope",
    ]
    assert {row["unit"] for row in rows} == {"milliseconds", "ratio"}
    cost = tmp_path / "figures" / "cost"
    assert {file.name for file in cost.iterdir()} == {
        *("figure.pdf", "figure.png", "drawn.csv", "caption.txt", "provenance.json"),
    }
    drawn = pd.read_csv(cost / "drawn.csv")
    assert set(drawn["panel"]) == {"over-target", "growth"}
    assert set(drawn["name"]) == {row["name"] for row in rows} - {"growth/rank/slope"}
    provenance = json.loads((cost / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["command"][:3] == ["python", "-m", "linchain_analysis.bench"]
    assert provenance["machine"] in provenance["caption"]


@pytest.mark.slow
def test_the_profiler_is_silent() -> None:
    done = bench("--quick", "--only", "memory", "--pairs", "1")
    assert done.returncode == 0, done.stderr
    for line in ("profiler_start", "CPUAllocator.cpp"):
        assert line not in done.stdout + done.stderr


@pytest.mark.slow
def test_every_topic_runs_quickly_and_says_what_it_should(tmp_path: Path) -> None:
    done = bench("--quick", "--peers", "--json", tmp_path / "rows.json", "--pairs", "1")
    assert done.returncode == 0, done.stderr
    rows = check_rows(tmp_path / "rows.json")
    assert list(dict.fromkeys(row["name"].partition("/")[0] for row in rows)) == NAMES
    targets = {row["name"]: row["target"] for row in rows if row["target"] is not None}
    assert targets["tracker/standard/hidden-32x2"] == 1.01
    assert targets["tracker/full/hidden-32x2"] == 1.05
    assert targets["tracker/standard/hidden-32x2/cpu-time"] == 10
    assert targets["memory/standard/hidden-32x2/kept"] == 2
    assert targets["floor/light/hidden-32x2"] == 3
    assert targets["log/standard/40-modules/live"] == 450
    assert targets["log/standard/40-modules/parquet"] == 330
    skipped = [row["note"] for row in rows if row["ratio_median"] is None]
    assert all(note.startswith("skipped: ") and note.endswith(" is not installed") for note in skipped)
