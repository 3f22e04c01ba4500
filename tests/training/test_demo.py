"""What the demo promises of the built-in problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from linchain_analysis import load_runs
from linchain_analysis.training import DEMO_METHODS, Grid, run_grid


@pytest.mark.slow
def test_every_method_learns_what_the_base_cannot_do(tmp_path: Path) -> None:
    result = run_grid(Grid(list(DEMO_METHODS), seeds=[3]), tmp_path / "demo")  # a seed that nothing was chosen by
    assert not result.failed
    evals = load_runs(tmp_path / "demo").evals
    accuracy = evals[evals["metric"] == "accuracy"].set_index(["method", "step"])["value"]
    for method in DEMO_METHODS:
        before, after = accuracy[method]
        assert before < 0.1
        assert after > 0.5, method
        print(method, before, after)
