"""Train a stack of chains of one shape, each by itself, in one computation.

Every product is a stack of small matrix products, of which NumPy makes one call of BLAS each: a chain's numbers do not
depend on which others are trained beside it, to the last bit. Stacks are cut into pieces that fit into the processor's
cache, and the pieces are shared among threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from linchain_analysis.measures.theory.gradients import factor_gradients, multiply_chain
from linchain_analysis.problems.synthetic import LinearMaps
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings, StackOptimizer

Floats = NDArray[np.float64]
_PIECE_BYTES = 1 << 20  # of one ΔW stack: it, the residual and the factors then stay in a core's cache


@dataclass(frozen=True)
class ChainStack:
    """K chains of one shape, as they start.

    Attributes:
        factors: A (K, d_in, w_0), W_i (K, w_{i-1}, w_i), B (K, w_n, d_out).
        index: (K,), the map of the problem that each learns.
        learning_rate: (K,).
        scale: What multiplies every product.
        trained: Which factors train; all by default.
        rate_factors: What multiplies the learning rate for each factor; ones by default (LoRA+ has more for B).
    """

    factors: Sequence[Floats]
    index: NDArray[np.intp]
    learning_rate: Floats
    scale: float = 1.0
    trained: Sequence[bool] | None = None
    rate_factors: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def rates(self) -> Floats:
        """Learning rate of each factor, (K, m); 0 for one that does not train."""
        factors = np.ones(len(self.factors)) if self.rate_factors is None else np.asarray(self.rate_factors, float)
        if self.trained is not None:
            factors = factors * np.asarray(self.trained)
        return self.learning_rate[:, None] * factors


@dataclass(frozen=True)
class Moment:
    """One recorded step of some chains of a stack.

    Attributes:
        step: Counted from 1.
        chains: (k,), which chains of the stack.
        before: The factors before the step.
        after: After it.
        gradients: ∂L/∂F_i before the step.
    """

    step: int
    chains: NDArray[np.intp]
    before: Sequence[Floats]
    after: Sequence[Floats]
    gradients: Sequence[Floats]


@dataclass
class Trained:
    """What became of a stack.

    Attributes:
        loss: (K, steps), the loss that each step was taken on, before it; NaN after a divergence.
        excess_loss: (K, steps + 1), loss before the first and after each step less the smallest that the chain's rank
            allows; NaN where that is not known.
        population_loss: (K, steps + 1), ½ E‖x(ΔW − T)‖² over the same.
        grad_norm: (K, steps), √Σ‖∂L/∂F_i‖².
        diverged_at: (K,), the step whose loss was the first that is not finite; 0 where there is none.
        factors: As they are at the end; of a diverged chain, as they were when it was given up.
    """

    loss: Floats
    excess_loss: Floats
    population_loss: Floats
    grad_norm: Floats
    diverged_at: NDArray[np.int64]
    factors: list[Floats] = field(default_factory=list)


def train_chains(
    problem: LinearMaps,
    stack: ChainStack,
    optimizer: OptimizerSettings,
    num_steps: int,
    *,
    observe: Callable[[Moment], None] | None = None,
    observe_at: Callable[[int], bool] = lambda step: True,
    num_threads: int | None = None,
) -> Trained:
    """Train every chain of `stack` for `num_steps` steps.

    A chain whose loss is no longer finite has diverged: it is given up, its later losses are NaN, and the others go on.

    Args:
        problem: What is learned.
        stack: The chains; they are left as they are.
        optimizer: How.
        num_steps: Number of steps.
        observe: Is shown each step for which `observe_at` is true, of one piece of the stack at a time; pieces may
            come from several threads. What it is shown must be neither changed nor kept.
        observe_at: Which steps.
        num_threads: Threads; one for each usable core by default.
    """
    count = len(stack)
    result = Trained(
        loss=np.full((count, num_steps), np.nan),
        excess_loss=np.full((count, num_steps + 1), np.nan),
        population_loss=np.full((count, num_steps + 1), np.nan),
        grad_norm=np.full((count, num_steps), np.nan),
        diverged_at=np.zeros(count, dtype=np.int64),
        factors=[np.array(factor, dtype=np.float64) for factor in stack.factors],
    )
    rank = min(factor.shape[-1] for factor in stack.factors[:-1])
    smallest = problem.smallest_losses(rank)
    d_in, d_out = problem.shape
    size = max(1, _PIECE_BYTES // (8 * d_in * d_out))
    pieces = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]

    def train(piece: NDArray[np.intp]) -> None:
        _train_piece(problem, stack, optimizer, num_steps, piece, smallest, result, observe, observe_at)

    threads = min(num_threads or len(os.sched_getaffinity(0)), len(pieces))
    if threads <= 1:
        for piece in pieces:
            train(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(train, pieces))
    return result


def _train_piece(
    problem: LinearMaps,
    stack: ChainStack,
    optimizer: OptimizerSettings,
    num_steps: int,
    alive: NDArray[np.intp],
    smallest: Floats,
    result: Trained,
    observe: Callable[[Moment], None] | None,
    observe_at: Callable[[int], bool],
) -> None:
    index = stack.index[alive]
    state = StackOptimizer(optimizer, [np.array(f[alive], dtype=np.float64) for f in stack.factors], stack.rates[alive])
    fixed = problem.batch_size is None
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, num_steps + 2):
            delta = stack.scale * multiply_chain(state.factors)
            population = problem.population_losses(delta, index)
            loss, gradient = problem.at_step(step).evaluate(delta, index)
            objective = loss if fixed else problem.losses(delta, index)
            result.population_loss[alive, step - 1] = population
            result.excess_loss[alive, step - 1] = objective - smallest[index]
            finite = np.isfinite(loss)
            if not finite.all():
                result.diverged_at[alive[~finite]] = step
                for whole, part in zip(result.factors, state.factors, strict=True):
                    whole[alive[~finite]] = part[~finite]
                state.keep(finite)
                alive, index, gradient, loss = alive[finite], index[finite], gradient[finite], loss[finite]
                if not len(alive):
                    return
            if step > num_steps:
                break
            gradients = factor_gradients(state.factors, gradient, stack.scale)
            result.loss[alive, step - 1] = loss
            squares = [np.einsum("kij,kij->k", g, g) for g in gradients]
            result.grad_norm[alive, step - 1] = np.sqrt(np.sum(squares, axis=0))
            if observe is None or not observe_at(step):
                state.step(gradients)
                continue
            before = [factor.copy() for factor in state.factors]
            state.step([gradient.copy() for gradient in gradients])
            observe(Moment(step, alive, before, state.factors, gradients))
    for whole, part in zip(result.factors, state.factors, strict=True):
        whole[alive] = part
