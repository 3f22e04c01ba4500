"""Train a stack of chains of one shape, each by itself, in one computation.

Every product is a stack of small matrix products, of which NumPy makes one call of BLAS each: a chain's numbers do not
depend on which others are trained beside it, to the last bit. Stacks are cut into pieces that fit into the processor's
cache, and the pieces are shared among threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.gradients import factor_gradients, multiply_chain
from linchain_analysis.problems.synthetic import LinearMaps
from linchain_analysis.problems.synthetic.checking import require_whole
from linchain_analysis.problems.synthetic.maps import Workspace
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings, StackOptimizer
from linchain_analysis.training.workers import count_cores

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

    def __post_init__(self) -> None:
        count, num_factors = len(self.learning_rate), len(self.factors)
        shapes = [factor.shape for factor in self.factors]
        stacked = num_factors >= 2 and all(len(shape) == 3 and shape[0] == count for shape in shapes)
        if not stacked or any(a[2] != b[1] for a, b in pairwise(shapes)):
            raise InputError(
                "factors",
                expected=f"A, W1, …, Wn, B, each a stack of {count} matrices, that can be multiplied in this order",
                got=f"the shapes {shapes}",
                do="give two factors at least, of one stack",
            )
        if not (np.ndim(self.learning_rate) == 1 and count and _all_at_least_zero(self.learning_rate)):
            raise InputError(
                "learning_rate",
                expected="finite learning rates (K,) of at least 0, one for each chain",
                got=repr(self.learning_rate),
                do="give such an array",
            )
        if np.shape(self.index) != (count,):
            raise InputError(
                "index", expected=f"{count} positions of maps", got=f"{np.shape(self.index)}", do="give one a chain"
            )
        for place, values in (("trained", self.trained), ("rate_factors", self.rate_factors)):
            if values is not None and not (len(values) == num_factors and _all_at_least_zero(values)):
                raise InputError(
                    place, expected=f"{num_factors} values, one for each factor", got=repr(values), do="give as many"
                )
        if not math.isfinite(self.scale):
            raise InputError("scale", expected="a finite number", got=repr(self.scale), do="give such a number")

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def trains(self) -> list[bool]:
        """Which factors train, (m,)."""
        return [True] * len(self.factors) if self.trained is None else [bool(trained) for trained in self.trained]

    @property
    def rates(self) -> Floats:
        """Learning rate of each factor, (K, m); 0 for one that does not train."""
        factors = np.ones(len(self.factors)) if self.rate_factors is None else np.asarray(self.rate_factors, float)
        return np.asarray(self.learning_rate[:, None] * (factors * np.asarray(self.trains)))


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


@dataclass(frozen=True)
class Trained:
    """What became of a stack. After a divergence the curves are NaN.

    Attributes:
        loss: (K, steps), the loss that each step was taken on, before it.
        excess_loss: (K, steps + 1), loss before the first and after each step less the smallest that the chain's rank
            allows, exact to the rounding of the two; NaN where that is not known. With fresh inputs at every step it is
            the loss expected over them.
        population_loss: (K, steps + 1), ½ E‖x(ΔW − T)‖² over the same; Inf where it overflows although the loss does
            not.
        grad_norm: (K, steps), √Σ‖∂L/∂F_i‖² over the factors that train.
        diverged_at: (K,), the first step whose loss, or the sum of squares of whose gradient, is not finite: the step
            that was not taken, steps + 1 where it would have been the next; 0 where there is none.
        factors: As they are at the end; of a diverged chain, as they were when it was given up.
    """

    loss: Floats
    excess_loss: Floats
    population_loss: Floats
    grad_norm: Floats
    diverged_at: NDArray[np.int64]
    factors: list[Floats]


def train_chains(
    problem: LinearMaps,
    stack: ChainStack,
    optimizer: OptimizerSettings,
    num_steps: int,
    *,
    observe: Callable[[Moment], None] | None = None,
    observe_at: Callable[[int], bool] = lambda step: True,
    on_step: Callable[[int], None] | None = None,
    num_threads: int | None = None,
) -> Trained:
    """Train every chain of `stack` for `num_steps` steps.

    A chain whose loss or gradient is no longer finite has diverged: it is given up, its later losses are NaN, and the
    others go on.

    BLAS has one thread meanwhile: with more, they wait for each other longer than such small products take.

    Args:
        problem: What is learned.
        stack: The chains; they are left as they are.
        optimizer: How.
        num_steps: Number of steps.
        observe: Is shown each step for which `observe_at` is true, of one piece of the stack at a time; pieces may
            come from several threads. What it is shown must be neither changed nor kept.
        observe_at: Which steps.
        on_step: Is told the number of every step before it is taken, of one piece of the stack at a time as `observe`;
            an exception that it raises ends the training.
        num_threads: Threads; one for each usable core by default.

    Raises:
        InputError: Chains of another shape than the maps, maps that are not there, or no number of steps.
    """
    require_whole("num_steps", num_steps, least=0)
    if num_threads is not None:
        require_whole("num_threads", num_threads, least=1)
    _check_fit(problem, stack)
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
    # Chains that learn the same map together: a piece then needs few maps, and draws few samples where these are fresh.
    order = np.argsort(stack.index, kind="stable")
    pieces = [order[start : start + size] for start in range(0, count, size)]

    def train(piece: NDArray[np.intp]) -> None:
        _train_piece(problem, stack, optimizer, num_steps, piece, smallest, result, observe, observe_at, on_step)

    threads = min(num_threads or count_cores(), len(pieces))
    with threadpool_limits(1, user_api="blas"):
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
    on_step: Callable[[int], None] | None,
) -> None:
    smallest = smallest[stack.index[alive]]
    used, index = np.unique(stack.index[alive], return_inverse=True)
    problem = problem.take(used)
    fixed = problem.batch_size is None
    state = StackOptimizer(optimizer, [np.array(f[alive], dtype=np.float64) for f in stack.factors], stack.rates[alive])
    work = Workspace()
    # A diverging chain overflows until it is noticed, in the same step or the next.
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, num_steps + 2):
            if on_step is not None and step <= num_steps:
                on_step(step)
            first, *rest = state.factors
            delta = np.matmul(first, multiply_chain(rest), out=work.empty("delta", (len(alive), *problem.shape)))
            if stack.scale != 1.0:
                delta *= stack.scale
            loss, gradient = problem.at_step(step).evaluate(delta, index, work)
            gradients = factor_gradients(state.factors, gradient, stack.scale)
            norm = _norms([g for g, trains in zip(gradients, stack.trains, strict=True) if trains], len(alive))
            finite = np.isfinite(loss) & np.isfinite(norm)
            if not finite.all():
                _give_up(alive[~finite], [factor[~finite] for factor in state.factors], step, result)
                state.keep(finite)
                alive, index, smallest = alive[finite], index[finite], smallest[finite]
                delta, loss, norm = delta[finite], loss[finite], norm[finite]
                gradients = [gradient[finite] for gradient in gradients]
                if not len(alive):
                    return
            population = loss if problem.is_population else problem.population_losses(delta, index, work)
            result.population_loss[alive, step - 1] = population
            result.excess_loss[alive, step - 1] = (loss if fixed else problem.losses(delta, index, work)) - smallest
            if step > num_steps:
                break
            result.loss[alive, step - 1] = loss
            result.grad_norm[alive, step - 1] = norm
            if observe is None or not observe_at(step):
                state.step(gradients)
                continue
            before = [factor.copy() for factor in state.factors]
            state.step(gradients)
            observe(Moment(step, alive, before, state.factors, gradients))
    for whole, part in zip(result.factors, state.factors, strict=True):
        whole[alive] = part


def _give_up(chains: NDArray[np.intp], factors: Sequence[Floats], step: int, result: Trained) -> None:
    result.diverged_at[chains] = step
    for whole, part in zip(result.factors, factors, strict=True):
        whole[chains] = part


def _norms(gradients: Sequence[Floats], count: int) -> Floats:
    # Added one by one: a reduction over an axis of this array would add in an order that depends on its shape.
    squares: Floats = np.zeros(count)
    for gradient in gradients:
        flat = gradient.reshape(len(gradient), -1)
        squares = squares + np.einsum("ki,ki->k", flat, flat)
    return np.asarray(np.sqrt(squares))


def _check_fit(problem: LinearMaps, stack: ChainStack) -> None:
    shape = (stack.factors[0].shape[1], stack.factors[-1].shape[2])
    if shape != problem.shape:
        raise InputError(
            "factors",
            expected=f"chains from {problem.shape[0]} to {problem.shape[1]}, as the maps are",
            got=f"from {shape[0]} to {shape[1]}",
            do="give A and B the sizes of the maps",
        )
    index = np.asarray(stack.index)
    if not (np.issubdtype(index.dtype, np.integer) and index.min() >= 0 and index.max() < len(problem)):
        raise InputError(
            "index",
            expected=f"positions from 0 to {len(problem) - 1}",
            got=repr(stack.index),
            do="give the position of each chain's map in the problem",
        )


def _all_at_least_zero(values: Sequence[float] | Sequence[bool] | Floats) -> bool:
    array = np.asarray(values, dtype=np.float64)
    return bool((np.isfinite(array) & (array >= 0)).all())
