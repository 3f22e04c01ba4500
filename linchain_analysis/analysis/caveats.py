"""Sentences that a curve needs beside it: where it ends early, and which runs left the finite numbers."""

from __future__ import annotations

import pandas as pd

from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.analysis.replication import complete_labels


def list_caveats(frame: pd.DataFrame, curves: pd.DataFrame) -> list[str]:
    """Return what a reader must know about curves that end early or break; empty where there is nothing to say.

    Args:
        frame: The rows the curves were computed from, with `method`, `run` and `step`.
        curves: What `trajectories` made of them.
    """
    sentences = []
    reached = frame.groupby(["method", "run"], observed=True, dropna=False)["step"].max().reset_index()
    ends = complete_labels(reached).set_index(["method", "run"])["step"]
    for method in sort_methods(ends.index.get_level_values("method")):
        lengths = ends.loc[method]
        if lengths.min() < lengths.max():
            short, long = int(lengths.min()), int(lengths.max())
            sentences.append(
                f"{method} is drawn up to step {short}, where its shortest run ({lengths.idxmin()}) ends; "
                f"others go to {long}."
            )
        own = curves[curves["method"] == method]
        broken = own[own["num_finite"] < own["num_seeds"]]
        if not broken.empty:
            worst = int((broken["num_seeds"] - broken["num_finite"]).max())
            sentences.append(
                f"{method}: NaN or Inf in {worst} of {int(own['num_seeds'].max())} runs, from step "
                f"{int(broken['step'].min())}; its curve breaks there."
            )
    return sentences
