"""Runs that are written whole read like those that went through streams, and never half."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from linchain_analysis.errors import RunError
from linchain_analysis.runs import Manifest, ModuleRecord, RunWriter, complete, load_run, write_run
from linchain_analysis.runs.schema import TABLES

MANIFEST = Manifest(
    command=("made",),
    method="lora-2",
    problem="shear",
    base_learning_rate=0.5,
    init_seed=1,
    data_seed=2,
    modules=(
        ModuleRecord("map", "map", None, "default", 3, 4, 1.0, (("A", (3, 2)), ("B", (2, 4)))),
        ModuleRecord("other", "other", 1, "default", 3, 4, 1.0, (("A", (3, 2)), ("B", (2, 4)))),
    ),
    columns={"modules": [["order_ratios", "values"]]},
    num_steps=3,
)
ROWS: dict[str, dict[str, Any]] = {
    "steps": {"step": [1, 2, 3], "loss": [4.0, 2.0, np.nan], "skipped": [False] * 3},
    "scalars": {"step": [1, 2, 3], "name": ["excess_loss"] * 3, "value": [3.0, 1.0, 0.5]},
    "modules": {
        "step": [1, 1, 3, 3],
        "module": ["map", "other"] * 2,
        "spectrum": np.array([[4.0, 3.0], [1.0, 0.0], [0.0, 0.0], [np.nan, np.nan]]),
        "order_ratios": [[1.0, 0.1], None, None, [0.5]],
    },
    "factors": {
        "step": np.full(4, 3),
        "module": np.array([0, 0, 1, 1], dtype=np.int32),
        "factor": ["A", "B", "A", "B"],
        "grad_norm": [1.0, 2.0, 3.0, 4.0],
    },
    "evals": {"step": [0, 3], "split": ["population"] * 2, "metric": ["loss"] * 2, "value": [1.0, 0.5]},
}


def test_a_run_reads_as_the_one_that_a_writer_wrote(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "streamed", MANIFEST)
    for table, columns in ROWS.items():
        writer.append(table, columns)
    writer.close()
    write_run(tmp_path / "whole", MANIFEST, ROWS)
    streamed, whole = load_run(tmp_path / "streamed"), load_run(tmp_path / "whole")
    for table in ("steps", "modules", "factors", "links", "evals", "health", "snapshots"):
        pd.testing.assert_frame_equal(whole.read(table), streamed.read(table), check_exact=True)
    assert whole.modules["delta_norm"].tolist()[:3] == [5.0, 1.0, 0.0]  # √(4² + 3²)
    assert whole.steps["excess_loss"].tolist() == [3.0, 1.0, 0.5]
    assert (whole.status, whole.is_alive, whole.num_steps) == ("complete", False, 3)
    assert replace(whole.manifest, process=None, ended=None) == replace(streamed.manifest, process=None, ended=None)
    kept = {path.name for path in (tmp_path / "whole").iterdir()}
    assert kept == {"manifest.json", *(f"{table}.parquet" for table in TABLES)}


def test_a_run_of_no_rows_is_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Manifest(command=()), {})
    run = load_run(tmp_path / "run")
    assert run.num_steps == 0 and run.steps.empty and run.modules.empty and run.status == "complete"


@pytest.mark.parametrize("content", ["notes.txt", "manifest.json", "manifest.json.part", "steps.parquet", ".lock"])
def test_a_folder_with_content_is_left_as_it_is(content: str, tmp_path: Path) -> None:
    (tmp_path / content).write_text("mine")
    with pytest.raises(RunError, match=f"expected an empty folder, got {content}"):
        write_run(tmp_path, MANIFEST, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == [content]
    assert (tmp_path / content).read_text() == "mine"


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"leaves": {"step": [1]}}, "expected tables among .*, got leaves"),
        ({"steps": {"step": [1], "lost": [2.0]}}, r"unknown \['lost'\]"),
        ({"steps": {"step": [1, 2], "loss": [2.0]}}, r"lengths \{'step': 2, 'loss': 1\}"),
        ({"modules": {"step": [1], "module": ["nobody"]}}, "expected a module of the manifest, got 'nobody'"),
    ],
)
def test_rows_that_cannot_be_leave_an_empty_folder(tables: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=complaint):
        write_run(tmp_path / "run", MANIFEST, {"evals": ROWS["evals"], **tables})
    assert list((tmp_path / "run").iterdir()) == []
    write_run(tmp_path / "run", MANIFEST, ROWS)  # and can be tried again


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_on_the_way_leaves_an_empty_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0
    write = complete.write_parquet

    def fail_later(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(complete, "write_parquet", fail_later)
    with pytest.raises(type(error)):
        write_run(tmp_path / "run", MANIFEST, ROWS)
    assert num_calls == 4 and list((tmp_path / "run").iterdir()) == []


def test_a_death_anywhere_leaves_no_run_or_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each operation on files a copy is taken, as the disk would have it after `kill -9`."""
    folder, copies = tmp_path / "run", []

    def spied(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            copies.append(shutil.copytree(folder, tmp_path / f"copy-{len(copies)}"))
            return result

        monkeypatch.setattr(owner, name, spy)

    spied(complete, "write_parquet")
    spied(Path, "replace")
    write_run(folder, MANIFEST, ROWS)
    monkeypatch.undo()
    assert len(copies) == 2 * len(TABLES) + 1
    for copy in copies[:-1]:
        assert (copy / complete.UNFINISHED).exists()  # how a sweep knows that it may be made again
        with pytest.raises(RunError, match="no manifest"):
            load_run(copy)
    assert load_run(copies[-1]).num_steps == 3
