"""Judge what the steps so far show: which factors do not learn, and the nearest reason why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from linchain_analysis.probes import Chain
from linchain_analysis.tracking.adapter_states import STATES, describe_states, sort_by_state
from linchain_analysis.tracking.announcements import Finding
from linchain_analysis.tracking.evidence import Evidence
from linchain_analysis.tracking.subjects import Mask, Subjects

NAMES = (*STATES, "frozen", "not_in_optimizer", "no_gradient", "zero_rate", "no_update", "still_zero")
# These are said for information: a run with none but these is well.
INFORMATION = ("frozen", "refused", "dead_directions")

_LEAST_COMPARED = 2  # recorded steps
_LEAST_OF_ZEROS = 3  # recorded steps
_LEAST_STEPS = 10  # after which a factor that is zero, or a rate that is, has had its time
_LEAST_UNMOVED = 5
_LEAST_STOPPED = 20  # recorded steps after which a gradient that was there has gone for good


def judge(
    chains: Sequence[Chain], subjects: Subjects, evidence: Evidence, model: nn.Module | None
) -> tuple[list[Finding], Mask]:
    """Return what holds now, each factor under the nearest reason, and which factors are meant to learn.

    Args:
        chains: The modules that are recorded.
        subjects: Names them.
        evidence: What the steps so far showed.
        model: Asked for gradient checkpointing when gradients are missing.
    """
    seen = evidence
    required, optimized, here = seen.required(), seen.optimized(), seen.held_here()
    silent = ~seen.had_gradient & ~seen.moved & here
    learning = seen.had_gradient & optimized | seen.moved
    by_module = subjects.modules_where_all
    states = sort_by_state(chains, by_module(silent), ~by_module(~required), bool(learning.any()))
    told = np.logical_or.reduce(list(states.values()))[subjects.module_of]
    meant = required & here & ~told
    found = describe_states(chains, subjects, states)
    if not seen.num_recorded:  # what is known without a step: why backward fails
        known = () if required.any() else ("adapter_disabled", "adapter_frozen")
        return [finding for finding in found if finding.name in known], meant

    # What moves between two recorded steps has another optimiser.
    compared = seen.num_recorded >= _LEAST_COMPARED
    rows = silent & ~required & ~told & compared
    if rows.any() and (rows := rows & ~_frozen_by_method(chains)).any():
        message = (
            f"requires_grad is False on {subjects.factors(rows)}, which stays as it is; if it should train, set it to "
            "True before the optimiser is made."
        )
        found.append(_about(rows, "frozen", subjects, message))
    rows = meant & ~optimized & ~seen.moved & compared
    if rows.any():
        message = (
            f"the optimiser has no parameter group with {subjects.factors(rows)}, which so never moves; make the "
            "optimiser after get_peft_model (or after the adapter is added)."
        )
        found.append(_about(rows, "not_in_optimizer", subjects, message))
    meant = meant & ~rows

    found += _missing_gradients(subjects, seen, meant, optimized & here & ~told, model)
    rows = optimized & here & (seen.without_rate >= _LEAST_STEPS)
    if rows.any():
        message = (
            f"the learning rate of {subjects.factors(rows)} was 0 in the last {int(seen.without_rate[rows].min())} "
            "steps; check the learning-rate schedule."
        )
        found.append(_about(rows, "zero_rate", subjects, message))
    stuck = optimized & here & (seen.unmoved >= _LEAST_UNMOVED)
    # While B is close to zero, the gradient of A is so small that float32 may well round its updates away: that passes.
    rows = stuck & by_module(stuck | ~optimized)[subjects.module_of]
    if stuck.any() and (rows := rows | (stuck & seen.short_types())).any():
        found.append(_about(rows, "no_update", subjects, _describe_unmoved(subjects, seen, rows)))
    rows = meant & ~seen.was_nonzero & (seen.with_rate >= _LEAST_STEPS) & ~rows & seen.had_gradient
    if rows.any():
        message = (
            f"still zero after {seen.num_steps} steps, though gradients arrive: {subjects.factors(rows)}; so ΔW is "
            "zero there; check that nothing sets the weights back after a step."
        )
        found.append(_about(rows, "still_zero", subjects, message))
    return found, meant


def _about(rows: Mask, name: str, subjects: Subjects, message: str) -> Finding:
    return Finding(name, subjects.factors(rows), message, int(rows.sum()))


def _missing_gradients(
    subjects: Subjects, seen: Evidence, meant: Mask, optimized: Mask, model: nn.Module | None
) -> list[Finding]:
    """Factors that no gradient reaches, or only zeros, or no longer."""
    none = meant & ~seen.held_gradient & ~seen.moved
    # A factor beside one that is zero has a zero gradient; only where all of a module have is that the module's own.
    # A single step may be one that says nothing, by its data.
    zero_only = subjects.modules_where_all(~seen.had_gradient)[subjects.module_of]
    zero = meant & seen.held_gradient & zero_only & (seen.num_recorded >= _LEAST_OF_ZEROS)
    had = optimized & seen.had_gradient
    steps = "in the one step recorded" if seen.num_recorded == 1 else f"in any of {seen.num_recorded} recorded steps"
    if none.any():
        rows = none | zero
        kind = "no gradient reaches" if not zero.any() else "no gradient, or one of exactly zero, reaches"
        advice = _advice_on_checkpointing(model) or (
            "check that the forward pass reaches it with gradients on: the model that get_peft_model returned, and no "
            "torch.no_grad, detach or reentrant checkpointing on the way"
        )
    elif zero.any():
        rows, kind = zero, "no gradient but one of exactly zero reaches"
        advice = "check that the loss depends on it: masked labels, a detach or factors that are all zero do this"
    elif had.any() and (seen.without_gradient[had] >= _LEAST_STOPPED).all():
        rows, kind = had, "no gradient reaches"
        steps = f"in the last {int(seen.without_gradient[had].min())} recorded steps"
        advice = "check that the adapter is still active, enabled and not merged"
    else:
        return []
    return [_about(rows, "no_gradient", subjects, f"{kind} {subjects.factors(rows)} {steps}; {advice}.")]


def _advice_on_checkpointing(model: nn.Module | None) -> str | None:
    if model is None or not any(_checkpoints_reentrantly(module) for module in model.modules()):
        return None
    return (
        "call model.enable_input_require_grads() before gradient checkpointing with use_reentrant=True, or pass "
        "use_reentrant=False"
    )


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether a module of transformers checkpoints so that nothing behind it has a gradient if its input asks none."""
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(options.get("use_reentrant", True))


def _describe_unmoved(subjects: Subjects, seen: Evidence, rows: Mask) -> str:
    dtypes = seen.dtypes(rows)
    if seen.short_types()[rows].all():
        advice = (
            f"updates this small are lost in rounding to {dtypes}: keep the adapter in float32 (get_peft_model does "
            "unless autocast_adapter_dtype=False) or raise the learning rate"
        )
    else:
        advice = "raise the learning rate, and check that nothing sets the weights back"
    steps = int(seen.unmoved[rows].min())
    return (
        f"in the last {steps} recorded steps nothing moved {subjects.factors(rows)}, though gradient and learning rate "
        f"are not zero; {advice}."
    )


def _frozen_by_method(chains: Sequence[Chain]) -> Mask:
    """Which factors PEFT itself keeps frozen, as some variants of LoRA ask for."""
    marks = []
    for chain in chains:
        declared = getattr(chain.adapted, "frozen_peft_weight_names", {}).get(chain.adapter, ())
        marks += [any(name.endswith(f"_{factor.name}") for name in declared) for factor in chain.factors]
    return np.array(marks, dtype=bool)
