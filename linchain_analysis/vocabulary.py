"""Every column of every table, defined once: unit, formula, moment of reading, dependence on the gauge.

Symbols: A (d_in, r), W_i (w_{i-1}, w_i), B (w_n, d_out) are the factors F_0 … F_{n+1} of a chain with its scale s;
delta = ΔW (d_in, d_out) is the change of the effective weight since training began; σ are its singular values,
descending; g_i = ∂L/∂F_i (F_i's shape) is the gradient of the whole step (after accumulation, unscaled, before
clipping); dF_i is F_i after the step minus F_i before it.

A loss in nats is a mean negative log-likelihood. Of runs whose loss has another unit (`loss_unit` in the `extra` of
their manifest; `1` for synthetic maps) that one stands for nats, in columns of gradients as well.

The gauge is the freedom W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1}, which leaves delta as it is. A column that depends on
the gauge describes this parametrisation and not the function; figures say so.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Literal

Table = Literal["steps", "modules", "factors", "links", "evals"]
Kind = Literal["int", "float", "bool", "text", "spectrum", "values"]
# What a column is made of; docs/columns.md says what each means under accumulation, clipping, scaling and sharding.
Basis = Literal[
    "factors",
    "update",
    "gradient",
    "gradient and update",
    "loss",
    "learning rate",
    "clipping",
    "scaler",
    "tokens",
    "noise",
    "trainer",
    "clock",
    "evaluation",
    "map",
]


@dataclass(frozen=True)
class Column:
    """One column of one table.

    Attributes:
        table: The table it stands in.
        name: Its name there.
        kind: `spectrum` is a list of floats, descending, `values` a list in the order that `meaning` says; every other
            kind is one value.
        unit: Unit, `1` for a pure number.
        meaning: What it is, with its formula where it has one.
        moment: When it is read, relative to the optimiser's step.
        key: Whether it is part of the table's key.
        derived: Whether it is computed on reading from the stored columns.
        gauge_dependent: Whether it changes under W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1}.
        source: Where the formula comes from.
        basis: What it is made of.
    """

    table: Table
    name: str
    kind: Kind
    unit: str
    meaning: str
    moment: str
    key: bool = False
    derived: bool = False
    gauge_dependent: bool = False
    source: str = ""
    basis: Basis = "factors"


NATS = (
    "nats"  # unit of a loss, and of what is made of it, unless the extra `loss_unit` of a run's manifest says another
)

_ROY = "Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality, EUSIPCO"
_RUDELSON = "Rudelson & Vershynin 2007, Sampling from large matrices, J. ACM 54(4)"
_ARORA = "Arora, Cohen & Hazan 2018, On the optimization of deep networks (arXiv 1802.06509)"

_STEP = "optimiser step (after gradient accumulation), counted from 1"
_MODULE = "adapted layer, by its dotted name in the base model; `name@adapter` where a layer trains several"

COLUMNS: tuple[Column, ...] = (
    # steps: one row per optimiser step, complete whatever `every` is
    Column("steps", "step", "int", "steps", _STEP, "counted as the step ends", key=True),
    Column(
        "steps",
        "epoch",
        "float",
        "epochs",
        "passes over the training data, as the Trainer counts them; NaN where nobody counts",
        "after the step",
        basis="trainer",
    ),
    Column(
        "steps",
        "loss",
        "float",
        "nats",
        "sum of the scalars on which backward was called since the last step, unscaled; what `log(loss=…)` says overrides it",
        "during the step's backward passes",
        basis="loss",
    ),
    Column(
        "steps",
        "learning_rate",
        "float",
        "1",
        "learning rate of the optimiser's first parameter group",
        "before the step",
        basis="learning rate",
    ),
    Column(
        "steps",
        "grad_norm",
        "float",
        "nats",
        "√Σ‖g‖² over all parameters of the optimiser",
        "before clipping",
        gauge_dependent=True,
        basis="gradient",
    ),
    Column(
        "steps",
        "clip_coef",
        "float",
        "1",
        "factor by which clipping multiplied the gradients; 1 without clipping, NaN where clipping was by value",
        "at clipping",
        basis="clipping",
    ),
    Column(
        "steps",
        "skipped",
        "bool",
        "1",
        "whether the gradient scaler found Inf or NaN and left the step out",
        "after the step",
        basis="scaler",
    ),
    Column(
        "steps",
        "tokens",
        "int",
        "tokens",
        "training tokens seen since training began, where the Trainer counts them or `log(tokens=…)` says them",
        "after the step",
        basis="trainer",
    ),
    Column(
        "steps",
        "seconds",
        "float",
        "s",
        "wall time from the end of the previous step to the end of this one, tracking included",
        "after the step",
        basis="clock",
    ),
    Column("steps", "track_seconds", "float", "s", "wall time the tracker took of it", "after the step", basis="clock"),
    # modules: one row per recorded step and adapted layer
    Column("modules", "step", "int", "steps", _STEP, "counted as the step ends", key=True),
    Column("modules", "module", "text", "", _MODULE, "at the first step", key=True),
    Column(
        "modules",
        "spectrum",
        "spectrum",
        "weight",
        "σ: singular values of delta, descending, padded by none",
        "after the step",
    ),
    Column(
        "modules",
        "delta_update_spectrum",
        "spectrum",
        "weight",
        "singular values of delta after the step minus delta before it, from telescoped factors",
        "after the step",
        basis="update",
    ),
    Column(
        "modules",
        "descent_cosine",
        "float",
        "1",
        "−Σ⟨g_i, dF_i⟩ / (√Σ‖g_i‖² √Σ‖dF_i‖²) over the factors, positive for descent; NaN where a norm is 0",
        "after the step",
        gauge_dependent=True,
        basis="gradient and update",
    ),
    Column(
        "modules",
        "delta_norm",
        "float",
        "weight",
        "Frobenius norm √Σσ²; 0 for delta = 0",
        "after the step",
        derived=True,
    ),
    Column(
        "modules",
        "delta_spectral_norm",
        "float",
        "weight",
        "σ₁; 0 for delta = 0",
        "after the step",
        derived=True,
    ),
    Column(
        "modules",
        "effective_rank",
        "float",
        "directions",
        "exp(−Σ p_i ln p_i) with p_i = σ_i/Σσ; NaN for delta = 0",
        "after the step",
        derived=True,
        source=_ROY,
    ),
    Column(
        "modules",
        "stable_rank",
        "float",
        "directions",
        "Σσ²/σ₁²; NaN for delta = 0",
        "after the step",
        derived=True,
        source=_RUDELSON,
    ),
    Column(
        "modules",
        "delta_update_norm",
        "float",
        "weight",
        "Frobenius norm of the update of delta",
        "after the step",
        derived=True,
        basis="update",
    ),
    Column(
        "modules",
        "delta_update_effective_rank",
        "float",
        "directions",
        "effective rank of the update of delta; NaN where it is 0",
        "after the step",
        derived=True,
        source=_ROY,
        basis="update",
    ),
    # factors: one row per recorded step, adapted layer and factor
    Column("factors", "step", "int", "steps", _STEP, "counted as the step ends", key=True),
    Column("factors", "module", "text", "", _MODULE, "at the first step", key=True),
    Column("factors", "factor", "text", "", "A, W1 … Wn, B, from input to output", "at the first step", key=True),
    Column(
        "factors",
        "grad_norm",
        "float",
        "nats/weight",
        "‖g_i‖, Frobenius",
        "before clipping",
        gauge_dependent=True,
        basis="gradient",
    ),
    Column(
        "factors",
        "grad_cosine_previous",
        "float",
        "1",
        "cosine of g_i with g_i of the last recorded step; NaN at the first and where either is 0",
        "before clipping",
        gauge_dependent=True,
        basis="gradient",
    ),
    Column(
        "factors",
        "update_norm",
        "float",
        "weight",
        "‖dF_i‖, Frobenius",
        "after the step",
        gauge_dependent=True,
        basis="update",
    ),
    Column(
        "factors",
        "weight_norm",
        "float",
        "weight",
        "‖F_i‖, Frobenius",
        "after the step",
        gauge_dependent=True,
    ),
    Column(
        "factors",
        "update_ratio",
        "float",
        "1",
        "‖dF_i‖ divided by ‖F_i‖ before the step; NaN where that is 0",
        "after the step",
        gauge_dependent=True,
        basis="update",
    ),
    # links: one row per recorded step, adapted layer and pair of neighbouring factors
    Column("links", "step", "int", "steps", _STEP, "counted as the step ends", key=True),
    Column("links", "module", "text", "", _MODULE, "at the first step", key=True),
    Column(
        "links",
        "link",
        "text",
        "",
        "neighbouring factors, input side first: `A-W1`, `W1-W2`, `Wn-B`",
        "at the first step",
        key=True,
    ),
    Column(
        "links",
        "balance_drift",
        "float",
        "1",
        "change since training began of F_iᵀF_i/η_i − F_{i+1}F_{i+1}ᵀ/η_{i+1}, relative",
        "after the step",
        gauge_dependent=True,
        source=_ARORA,
    ),
    # evals: one row per evaluation, split and metric
    Column(
        "evals",
        "step",
        "int",
        "steps",
        "last optimiser step before the evaluation, 0 before training",
        "at the evaluation",
        key=True,
    ),
    Column("evals", "split", "text", "", "which data: `eval`, `test`, …", "at the evaluation", key=True),
    Column(
        "evals",
        "metric",
        "text",
        "",
        "what was measured on it: `loss`, `accuracy`, …; on the split `population` of a synthetic map `relative_loss` and "
        "`population_excess_loss`, which is ½E‖x(ΔW − T)‖² minus the smallest that any ΔW of the chain's rank can have",
        "at the evaluation",
        key=True,
    ),
    Column("evals", "value", "float", "of the metric", "the measurement", "at the evaluation", basis="evaluation"),
)


def columns_of(table: str) -> tuple[Column, ...]:
    """Return the columns that `table` has in every run, in their order there; empty for an unknown table."""
    return tuple(column for column in COLUMNS if column.table == table)


def measured_columns(table: str) -> tuple[Column, ...]:
    """Return the columns of `table` that not every run has: those of measures, noise scales and synthetic maps.

    Those of measures stand where a run asked for them, or are computed on demand. Each is defined beside the function
    that computes it, in `linchain_analysis.measures`, which is looked through when this is first called.
    """
    registry = importlib.import_module("linchain_analysis.measures.registry")
    found: tuple[Column, ...] = registry.measure_columns(table)
    return found


def define_column(table: str, name: str, loss_unit: str = NATS) -> Column | None:
    """Return the definition of column `name` of `table`, or None where the user named it (`log(name=…)`).

    Args:
        table: The table.
        name: Of the column.
        loss_unit: Unit of the loss, where runs say another one.
    """
    fixed = next((column for column in columns_of(table) if column.name == name), None)
    found = fixed or next((column for column in measured_columns(table) if column.name == name), None)
    return None if found is None else with_loss_unit(found, loss_unit)


def with_loss_unit(column: Column, loss_unit: str) -> Column:
    """Return `column` as it is for runs whose loss has another unit than nats, `1` for a pure number."""
    if loss_unit == NATS or NATS not in column.unit:
        return column
    unit = column.unit.replace(f"{NATS}²", NATS) if loss_unit == "1" else column.unit  # 1² is 1
    return replace(column, unit=unit.replace(NATS, loss_unit))
