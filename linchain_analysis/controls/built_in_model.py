"""What the controls on the built-in language model share: its batches, a fresh adapted copy, the weights in force."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model

from linchain_analysis.problems import load_problem
from linchain_analysis.training.batches import Example, collate
from linchain_analysis.training.preparation import PreparedProblem

Floats = NDArray[np.float64]


@cache
def prepare_sums() -> PreparedProblem:
    """Return the built-in problem, loaded once for all controls."""
    return PreparedProblem(load_problem("sums"), torch.float32)


def draw_batches(seed: int, num_steps: int, batch_size: int) -> Iterator[Example]:
    """Yield `num_steps` batches of training records; each record comes once before any comes again.

    Args:
        seed: Of their order.
        num_steps: Number of batches.
        batch_size: Records in each.
    """
    problem = prepare_sums()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = len(problem.train)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(count) for _ in range(-(-num_steps * batch_size // count))])
    for step in range(num_steps):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        batch = collate([problem.train[int(index)] for index in chosen], pad_token_id=problem.pad_token_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def adapt_model(seed: int, **options: Any) -> Any:
    """Return a fresh copy of the built-in model under LoRA on the problem's layers, its first factors of `seed`.

    Args:
        seed: Of the initial factors.
        **options: Of `peft.LoraConfig`.
    """
    problem = prepare_sums()
    base = problem.load_model()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(target_modules=list(problem.problem.target_modules), **options))


def trained_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of `model` that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
