"""The house keeps its shape: which room may import which, and what imports without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "linchain_analysis"
GROUND = {"errors", "method_names", "vocabulary"}
ROOMS = {
    "measures": set(),
    # Of measures, runs may use what turns stored spectra into ranks and norms, so that a formula stands in one place.
    "runs": {"measures"},
    "adapters": set(),
    "probes": {"adapters", "measures"},
    "tracking": {"probes", "measures", "runs"},
    "problems": set(),
    # The batched training of synthetic maps has no model to probe: it measures its factors itself.
    "training": {"adapters", "tracking", "problems", "runs", "measures"},
    "analysis": {"runs", "measures"},
    "plots": {"analysis"},
    "watching": {"runs", "measures"},
    "auditing": {"measures", "probes", "adapters", "runs", "problems"},
    # It measures every other room, and nothing but the door imports it.
    "benchmarks": {"adapters", "probes", "tracking", "runs", "problems", "training", "measures", "analysis", "plots"},
    # Whole experiments with every other room, which nothing but their door imports.
    "controls": {
        "adapters",
        "analysis",
        "auditing",
        "measures",
        "plots",
        "probes",
        "problems",
        "runs",
        "tracking",
        "training",
    },
}
WITHOUT_TORCH = ("measures", "runs", "analysis", "plots", "watching")


NO_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
"""


def imported_rooms(file: Path) -> set[str]:
    """First part, after the package, of everything that `file` imports from the package, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("linchain_analysis.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    allowed = ROOMS[room] | GROUND | {room}
    for file in (PACKAGE / room).rglob("*.py"):
        wrong = imported_rooms(file) - allowed
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_ground_imports_nothing_and_nothing_imports_a_door() -> None:
    for name in GROUND:
        assert imported_rooms(PACKAGE / f"{name}.py") <= GROUND
    doors = {file.stem for file in PACKAGE.glob("*.py")} - GROUND - {"__init__"}
    assert doors >= {"track", "finetune", "sweep", "figures", "bench", "audit", "watch", "calibrate"}
    for file in PACKAGE.rglob("*.py"):
        assert not imported_rooms(file) & doors, file


def test_there_is_no_room_that_this_test_does_not_know() -> None:
    assert {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_neither_torch_nor_peft() -> None:
    code = "import sys, linchain_analysis; print({'torch', 'peft', 'transformers', 'pandas'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_some_rooms_never_need_torch(room: str) -> None:
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in (PACKAGE / room).rglob("*.py")
    ]
    code = NO_TORCH + "\n".join(f"import {module}" for module in modules)
    run_python(code, MPLBACKEND="Agg")


def test_every_public_name_loads() -> None:
    import linchain_analysis

    for name in linchain_analysis.__all__:
        assert getattr(linchain_analysis, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trakcer'"):
        linchain_analysis.Trakcer  # noqa: B018
    assert set(dir(linchain_analysis)) >= set(linchain_analysis.__all__)
