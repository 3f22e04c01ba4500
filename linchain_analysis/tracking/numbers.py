"""Find NaN and Inf in what a step showed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from linchain_analysis.probes import Chain
from linchain_analysis.tracking.announcements import Finding
from linchain_analysis.tracking.evidence import Evidence
from linchain_analysis.tracking.observers import FinishedStep
from linchain_analysis.tracking.subjects import Mask, Subjects

_NAN = float("nan")


def find_broken_numbers(
    finished: FinishedStep, chains: Sequence[Chain], subjects: Subjects, evidence: Evidence, refused: Mask
) -> Finding | None:
    """Return what is NaN or Inf in a step that happened, or None.

    Args:
        finished: The step.
        chains: The modules that are recorded.
        subjects: Names them.
        evidence: Tells a gradient that is NaN from none.
        refused: The modules whose delta is not measured.
    """
    loss, total = (finished.values.get(name, _NAN) for name in ("loss", "grad_norm"))
    parts: list[str] = []
    gradients_broken = np.isinf(total)
    if finished.reading is None:
        # NaN is also what stands where there is no gradient, or where no loss was seen.
        gradients_broken = gradients_broken or (np.isnan(total) and evidence.any_gradient())
        parts += ["the gradients"] * bool(gradients_broken)
    else:
        columns = finished.reading.factors
        weights, deltas = columns["weight_norm"], finished.reading.delta_norm
        if np.isfinite(total) and np.isfinite(weights).all() and np.isfinite(deltas[~refused]).all():
            return _describe(["the loss"], finished.step) if np.isinf(loss) else None
        broken = evidence.broken_gradients(finished)
        gradients_broken = gradients_broken or broken.any() or (np.isnan(total) and evidence.any_gradient())
        if broken.any():
            parts.append(f"the gradients of {_counted(broken, subjects)}")
        elif gradients_broken:
            parts.append("the gradients of other parameters of the optimiser")
        rows = ~np.isfinite(weights) & evidence.held_here()
        if rows.any():
            parts.append(f"the weights of {_counted(rows, subjects)}")
        whole = ~np.logical_or.reduceat(rows, subjects.offsets) if len(chains) else np.zeros(0, dtype=bool)
        for number in np.flatnonzero(~np.isfinite(deltas) & ~refused & whole).tolist():
            if np.isfinite(chains[number].scale):  # else the product is not the change of the weight any more
                parts.append(f"ΔW of {subjects.names[number]}")
                break
    if np.isinf(loss) or (np.isnan(loss) and gradients_broken):
        parts.insert(0, "the loss")
    return _describe(parts, finished.step) if parts else None


def _describe(parts: list[str], step: int) -> Finding:
    subject = ", ".join(parts)
    message = (
        f"NaN or Inf from step {step} on in {subject}; lower the learning rate, clip gradients, or train in bfloat16 "
        "or float32 where it is float16."
    )
    return Finding("non_finite", subject, message)


def _counted(rows: Mask, subjects: Subjects) -> str:
    count = int(rows.sum())
    if count == len(rows):
        return f"all {count} factors"
    return subjects.first(rows) if count == 1 else f"{count} of {len(rows)} factors, first {subjects.first(rows)}"
