"""The equations of chains as functions: gradients, preconditioner, counts of paths, factors as they start."""

from linchain_analysis.measures.theory.gradients import (
    factor_gradients,
    first_gradient,
    inner_gradient,
    last_gradient,
    printed_errors,
    printed_inner_gradient,
)
from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factors
from linchain_analysis.measures.theory.tangent import measure_tangent_rank, preconditioned_gradient, tangent_rank
from linchain_analysis.measures.theory.traces import TraceCount, count_traces

__all__ = [
    "TraceCount",
    "count_traces",
    "draw_first_factor",
    "draw_inner_factors",
    "factor_gradients",
    "first_gradient",
    "inner_gradient",
    "last_gradient",
    "measure_tangent_rank",
    "preconditioned_gradient",
    "printed_errors",
    "printed_inner_gradient",
    "tangent_rank",
]
