"""Factors drawn in NumPy are distributed as those that the adapters draw in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn

from linchain_analysis.adapters import initialisation as adapters
from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.initial_factors import (
    draw_first_factor,
    draw_inner_factor,
    draw_inner_factors,
    draw_orthogonal,
)
from linchain_analysis.method_names import CHAIN_INITS, UNIFORM_GAINS

Array = NDArray[np.float64]

# With the seeds as they are the p-values below are fixed numbers: a level of 1e-3 is no chance that a test fails.
LEVEL = 1e-3


def drawn_by_adapters(shape: tuple[int, int], init: str, count: int) -> Array:
    """Chain view (count, w_{i-1}, w_i)."""
    return np.stack(
        [adapters.draw_inner_factors(shape, init, seed)[0].double().numpy().T for seed in range(count)],
    )


def drawn_here(shape: tuple[int, int], init: str, count: int) -> Array:
    return np.stack([draw_inner_factor(shape, init, np.random.default_rng([7, seed])) for seed in range(count)])


@pytest.mark.parametrize("shape", [(8, 8), (8, 16), (16, 8), (4, 1)])
@pytest.mark.parametrize("init", list(UNIFORM_GAINS))
def test_uniform_inits_are_those_of_the_adapters(shape: tuple[int, int], init: str) -> None:
    ours, theirs = drawn_here(shape, init, 60), drawn_by_adapters(shape, init, 60)
    bound = UNIFORM_GAINS[init] * math.sqrt(3 / shape[0])
    for found in (ours, theirs):
        assert found.shape == (60, *shape)
        # The largest of N uniform draws lies within 10/N of the bound but for e^-10; float32 rounds it by 6e-8.
        assert bound * (1 - 10 / found.size) <= np.abs(found).max() <= bound * (1 + 1e-7)
        # The variance of a uniform's mean square is 4/45 bound⁴ / N.
        spread = math.sqrt(4 / 45 / found.size) * bound**2
        assert abs((found**2).mean() - UNIFORM_GAINS[init] ** 2 / shape[0]) < 4 * spread
    assert stats.ks_2samp(ours.ravel(), theirs.ravel()).pvalue > LEVEL


def test_a_is_that_of_peft() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(300, 5)), LoraConfig(r=16, target_modules=["0"]))
    theirs = model.base_model.model[0].lora_A["default"].weight.detach().double().numpy().T
    ours = draw_first_factor(300, 16, np.random.default_rng(0))
    assert ours.shape == theirs.shape == (300, 16)
    for found in (ours, theirs):
        assert 0.998 / math.sqrt(300) < np.abs(found).max() <= (1 + 1e-7) / math.sqrt(300)
    assert stats.ks_2samp(ours.ravel(), theirs.ravel()).pvalue > LEVEL


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 3)])
def test_orthogonal_is_orthonormal_and_uniform_as_in_the_adapters(shape: tuple[int, int]) -> None:
    ours, theirs = drawn_here(shape, "orthogonal", 300), drawn_by_adapters(shape, "orthogonal", 300)
    for found, rounding in ((ours, 1e-14), (theirs, 1e-6)):
        small = found if shape[0] <= shape[1] else found.swapaxes(1, 2)
        gram = small @ small.swapaxes(1, 2)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(min(shape)), gram.shape), rtol=0, atol=rounding)
    # Uniform: every entry is distributed as a coordinate of a uniform unit vector, x² as Beta(1/2, (d − 1)/2). The
    # first column's entries would all be of one sign without the correction of QR's signs.
    longer = max(shape)
    for entries in (ours[:, 0, 0], ours[:, -1, -1], ours[:, 0, -1]):
        assert stats.kstest(entries**2, stats.beta(0.5, (longer - 1) / 2).cdf).pvalue > LEVEL
        assert stats.binomtest(int((entries > 0).sum()), len(entries)).pvalue > LEVEL
    for place in ((0, 0), (-1, -1)):
        assert stats.ks_2samp(ours[:, *place], theirs[:, *place]).pvalue > LEVEL


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_identity_is_that_of_the_adapters(shape: tuple[int, int]) -> None:
    (theirs,) = drawn_by_adapters(shape, "identity", 1)
    np.testing.assert_array_equal(draw_inner_factor(shape, "identity", np.random.default_rng(0)), theirs)
    assert theirs.trace() == min(shape)


@pytest.mark.parametrize("init", CHAIN_INITS)
def test_factors_of_a_chain(init: str) -> None:
    factors = draw_inner_factors((8, 16, 16, 8), init, np.random.default_rng(0))
    assert [f.shape for f in factors] == [(8, 16), (16, 16), (16, 8)]
    again = draw_inner_factors((8, 16, 16, 8), init, np.random.default_rng(0))
    for one, other in zip(factors, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert draw_inner_factors((8,), init, np.random.default_rng(0)) == []


def test_uniform_inits_share_their_random_numbers() -> None:
    draws = {init: draw_inner_factor((5, 5), init, np.random.default_rng(3)) for init in UNIFORM_GAINS}
    for init, drawn in draws.items():
        np.testing.assert_allclose(drawn, UNIFORM_GAINS[init] * draws["lecun"], rtol=1e-14)


def test_wide_and_tall_orthogonal_matrices_are_contiguous() -> None:
    for shape in ((2, 5), (5, 2)):
        assert draw_orthogonal(shape, np.random.default_rng(0)).flags.c_contiguous


def test_an_unknown_init() -> None:
    with pytest.raises(InputError, match="got 'xavier'"):
        draw_inner_factor((2, 2), "xavier", np.random.default_rng(0))
