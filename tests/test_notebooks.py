"""Every notebook runs from its first cell to its last, in a folder without any runs."""

import os
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
# Of a whole notebook, so that one that hangs ends. 02 and 03 took 58 and 23 s of processor time, and up to 117 s on two
# cores that several processes wanted: this is no measure of speed.
NOTEBOOK_SECONDS = 400


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One thread for each process, as everywhere: workers that share two cores only get in each other's way.
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    copy = tmp_path / shutil.copy(path, tmp_path)
    notebook = nbformat.read(copy, as_version=4)
    end = time.monotonic() + NOTEBOOK_SECONDS

    def left(cell: nbformat.NotebookNode) -> int:
        return max(1, int(end - time.monotonic()))

    # A cell that fails raises CellExecutionError with its traceback, one that has no time left CellTimeoutError.
    NotebookClient(notebook, timeout_func=left, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_outputs_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_no_functions_and_names_no_place_of_this_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert not [
        line for source in sources for line in source.splitlines() if line.lstrip().startswith(("def ", "class "))
    ]
    assert "lambda" not in "".join(sources)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
