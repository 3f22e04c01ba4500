"""Whether the weights of a training, and what it measures delta from, are those of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from linchain_analysis.probes import Chain

# Norms are recorded in float32 and taken in float64 of what comes back from the checkpoint bit by bit.
_SAME = 1e-5
# A product of factors that were rounded is off by as much as they are together; a start that is missing, by more.
_SAME_DELTA = 2e-2
_NARROW = ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10))
_SLACK = 3.0  # how much larger the updates of steps that were not recorded may be than those that were


@torch.no_grad()
def find_other_weight(rows: pd.DataFrame, step: int, chains: Sequence[Chain], *, take_word: bool) -> str | None:
    """Say which factor is not what it was after `step`; None where all are.

    Where `step` was not recorded whole, the norms of the steps that were, before and after it, must be within reach:
    the norm of a factor moves by no more than the norms of its updates, which change little over some steps.

    Args:
        rows: `step module factor weight_norm update_norm` of the table `factors`.
        step: At which the training stands.
        chains: Its factors as they are.
        take_word: Whether to believe it where nothing was recorded to compare with.
    """
    steps = np.unique(rows["step"].to_numpy())
    near = sorted({int(s) for s in (*steps[steps <= step][-1:], *steps[steps >= step][:1])})
    if not near:
        return None if take_word else "no step was recorded whole, so that it cannot be told by its weights"
    if not take_word and all(hasattr(f.parameter, "full_tensor") for chain in chains for f in chain.factors):
        return "its weights are held in parts, so that it cannot be told by them; say resume=STEP"
    recorded = [_by_factor(rows[rows["step"] == number]) for number in near]
    for chain in chains:
        for factor in chain.factors:
            key = chain.module, factor.name
            if any(key not in norms for norms in recorded):
                return f"{factor.name} of {chain.module} was not recorded"
            if hasattr(factor.parameter, "full_tensor"):  # sharded, so not whole on this process
                continue
            now = _norm(factor.parameter)
            reach = _SLACK * max(norms[key][1] for norms in recorded)
            for number, norms in zip(near, recorded, strict=True):
                then = norms[key][0]
                allowed = abs(step - number) * reach + _rounding(factor.parameter) * max(now, then)
                if not (abs(now - then) <= allowed or (not np.isfinite(now) and not np.isfinite(then))):
                    return (
                        f"{factor.name} of {chain.module} had norm {then:.6g} after step {number} and has {now:.6g} "
                        f"at step {step}"
                    )
    return None


@torch.no_grad()
def find_other_delta(rows: pd.DataFrame, step: int, chains: Sequence[Chain]) -> str | None:
    """Say of which chain delta was not the product of its factors, so that where it began is missing; None of none.

    Args:
        rows: `step module delta_norm` of the table `modules`.
        step: At which the training stands; where it was not recorded whole, nothing is said.
        chains: Their factors as they are.
    """
    here = rows[rows["step"] == step]
    norms = dict(zip(here["module"].astype(str), here["delta_norm"].astype(float), strict=True))
    for chain in chains:
        then = norms.get(chain.module, float("nan"))
        if chain.refused or not np.isfinite(then) or any(hasattr(f.parameter, "full_tensor") for f in chain.factors):
            continue
        first, *others = (factor.view(factor.parameter.detach()).cpu().double() for factor in chain.factors)
        rest = torch.linalg.multi_dot(others) if len(others) > 1 else others[0]
        now = chain.scale * float((rest * (first.mT @ first @ rest)).sum().clamp(min=0).sqrt())
        if abs(now - then) > _SAME_DELTA * max(now, then):
            return (
                f"delta of {chain.module} had norm {then:.6g}, that of its factors is {now:.6g}: its start is missing"
            )
    return None


def _by_factor(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    """Norm and norm of the update of each factor."""
    columns = (rows[name] for name in ("module", "factor", "weight_norm", "update_norm"))
    return {
        (str(module), str(factor)): (float(norm), float(update))
        for module, factor, norm, update in zip(*columns, strict=True)
    }


def _norm(parameter: Tensor) -> float:
    return float(torch.linalg.vector_norm(parameter.detach().cpu().double()))


def _rounding(parameter: Tensor) -> float:
    """How far a checkpoint may have rounded: what it kept in fewer bits than the weights have fits into these."""
    value = parameter.detach()
    for dtype, unit in _NARROW:
        if value.dtype in (torch.float32, torch.float64) and torch.equal(value.to(dtype).to(value.dtype), value):
            return unit
    return _SAME
