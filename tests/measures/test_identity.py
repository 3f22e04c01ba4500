"""The identity of a step of gradient descent, on chains by hand and in tracked training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from chain_cores import (
    FullChain,
    Shape,
    change_gauge,
    every_shape,
    factor_gradients,
    preconditioned,
    random_chain,
    small_cores,
)
from small_training import build, train_step
from torch import nn

from linchain_analysis import Tracker, load_run
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.identity import measure_sgd_identity
from linchain_analysis.measures.orders import order_terms

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def error(cores: Cores) -> list[float]:
    return list(measure_sgd_identity(cores)["sgd_identity_error"])


def descend(chain: FullChain, gradient: np.ndarray, rates: np.ndarray) -> FullChain:
    """A step of gradient descent on a loss whose gradient of the full weight is G."""
    gradients = factor_gradients(chain.before, gradient, chain.scale)
    change = [-rate * own for rate, own in zip(rates, gradients, strict=True)]
    return replace(chain, gradient=gradients, change=change)


@every_shape
def test_a_step_of_gradient_descent_obeys_it(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    chains, rates = [], np.full((2, len(shape[1]) + 1), 1e-3)
    for scale in (2.0, -0.5):
        chain = random_chain(rng, shape, scale=scale)
        chains.append(descend(chain, rng.standard_normal(chain.size), rates[0]))
    cores, _ = small_cores(chains, learning_rate=rates)
    assert max(error(cores)) < 1e-12


@every_shape
def test_the_first_order_is_the_dense_preconditioner(shape: Shape) -> None:
    """C_1 = −lr · scale² · P(G), in full size."""
    rng = np.random.default_rng(1)
    chain = random_chain(rng, shape)
    gradient = rng.standard_normal(chain.size)
    stepped = descend(chain, gradient, np.full(len(chain.before), 0.01))
    cores, (basis,) = small_cores([stepped], learning_rate=np.full((1, len(chain.before)), 0.01))
    expected = -0.01 * chain.scale**2 * preconditioned(chain.before, gradient)
    first = basis.lift(order_terms(cores)[0][0])
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-13 * np.linalg.norm(first))


def test_by_hand() -> None:
    """A = 1, B = 2, scale 3, g = (5, 7), rates (0.1, 0.2), steps (−0.5, −1): what is left is that of B alone."""
    one = np.ones((1, 1, 1))
    cores = Cores(
        scale=np.array([3.0]),
        before=(one, 2 * one),
        change=(-0.5 * one, -1.0 * one),
        size=(1, 1),
        gradient=(5 * one, 7 * one),
        learning_rate=np.array([[0.1, 0.2]]),
    )
    # C_1 = 3 (−0.5 · 2 + 1 · −1) = −6; left over 3 · 1 · (−1 + 1.4) = 1.2
    np.testing.assert_allclose(error(cores), [0.2], rtol=1e-14)


def test_rates_of_their_own_and_factors_that_do_not_train() -> None:
    rng = np.random.default_rng(2)
    chain = random_chain(rng, (9, (4, 4), 12))
    rates = np.array([1e-3, 2e-2, 5e-1])
    stepped = descend(chain, rng.standard_normal(chain.size), rates)
    cores, _ = small_cores([stepped], learning_rate=rates[None])
    assert error(cores)[0] < 1e-12
    # One rate for all is not what happened here.
    assert error(replace(cores, learning_rate=np.full((1, 3), 1e-3)))[0] > 0.1
    # A frozen factor has no gradient and stands in no group.
    frozen = replace(stepped, change=[np.zeros_like(f) if i == 1 else f for i, f in enumerate(stepped.change)])
    cores, _ = small_cores([frozen])
    gradient = tuple(np.full_like(g, np.nan) if i == 1 else g for i, g in enumerate(cores.gradient or ()))
    known = np.where(np.arange(3) == 1, np.nan, rates)[None]
    cores = replace(cores, gradient=gradient, learning_rate=known, trained=np.array([[True, False, True]]))
    assert error(cores)[0] < 1e-12


def test_clipping_shows_as_what_it_took_away() -> None:
    rng = np.random.default_rng(3)
    chain = random_chain(rng, (9, (4, 4), 12))
    stepped = descend(chain, rng.standard_normal(chain.size), np.full(3, 1e-2))
    clipped = replace(stepped, change=[0.25 * change for change in stepped.change])
    cores, _ = small_cores([clipped], learning_rate=np.full((1, 3), 1e-2))
    np.testing.assert_allclose(error(cores), [(1 - 0.25) / 0.25], rtol=1e-12)


def test_the_error_of_the_same_factors_does_depend_on_the_gauge() -> None:
    """Gradient descent in another gauge is another step; in its own gauge each obeys the identity."""
    rng = np.random.default_rng(4)
    chain = random_chain(rng, (9, (4, 4), 12))
    gradient, rates = rng.standard_normal(chain.size), np.full(3, 1e-2)
    turned = change_gauge(chain, [2 * np.eye(4), np.eye(4) + 0.1 * rng.standard_normal((4, 4))])
    for one in (chain, turned):
        cores, _ = small_cores([descend(one, gradient, rates)], learning_rate=rates[None])
        assert error(cores)[0] < 1e-12
    carried = change_gauge(descend(chain, gradient, rates), [2 * np.eye(4), np.eye(4)])
    cores, _ = small_cores([carried], learning_rate=rates[None])
    assert error(cores)[0] > 0.1


def test_undefined() -> None:
    rng = np.random.default_rng(5)
    still = random_chain(rng, (9, (4, 4), 12), step=0)
    moving = descend(random_chain(rng, (9, (4, 4), 12)), rng.standard_normal((9, 12)), np.full(3, 1e-2))
    cores, _ = small_cores([still, moving], learning_rate=np.full((2, 3), 1e-2))
    assert np.isnan(error(cores)[0])
    assert error(cores)[1] < 1e-12
    assert np.isnan(error(replace(cores, gradient=None))).all()
    assert np.isnan(error(replace(cores, learning_rate=None))).all()
    # A factor that moves at a rate that is not known.
    assert np.isnan(error(replace(cores, learning_rate=np.array([[1e-2, np.nan, 1e-2]] * 2)))).all()
    diverged = replace(cores, change=tuple(np.full_like(c, np.inf) for c in cores.change))
    assert np.isnan(error(diverged)).all()


# --- tracked training ------------------------------------------------------------------------------------------------


def tracked(
    folder: Path,
    optimize: Callable[[nn.Module], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    method: str = "linchain-2-4",
) -> pd.DataFrame:
    model = build(method).to(dtype)
    optimizer = optimize(model)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the batches are drawn in it
    try:
        with Tracker(model, optimizer, folder, measures=["sgd_identity"], strict=True):
            for step in range(1, 7):
                train_step(model, optimizer, step)
    finally:
        torch.set_default_dtype(usual)
    return load_run(folder).read("modules", ["step", "module", "sgd_identity_error"])


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("method", ["lora-4", "linchain-2-4", "linchain-2-8"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_plain_sgd_in_training(tmp_path: Path, method: str, dtype: torch.dtype, bound: float) -> None:
    """Bounds: the cores come of Gram matrices, which resolve √ε of an outer factor's size at worst; 6e-8 in float32."""
    found = tracked(tmp_path / "run", lambda model: torch.optim.SGD(parameters(model), lr=0.05), dtype, method)
    assert len(found) == 2 * 6
    assert found["sgd_identity_error"].between(0, bound).all()


def test_groups_with_learning_rates_of_their_own(tmp_path: Path) -> None:
    def optimize(model: nn.Module) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        last = [p for n, p in named if "lora_B" in n]
        others = [p for n, p in named if "lora_B" not in n]
        return torch.optim.SGD([{"params": others, "lr": 0.01}, {"params": last, "lr": 0.16}])

    found = tracked(tmp_path / "run", optimize)
    assert found["sgd_identity_error"].between(0, 1e-5).all()


def test_other_optimisers_are_told_apart(tmp_path: Path) -> None:
    adam = tracked(tmp_path / "adam", lambda model: torch.optim.AdamW(parameters(model), lr=1e-2))
    assert adam["sgd_identity_error"].between(0.1, 10).all()
    # Momentum: the first step is plain, and later ones are not.
    momentum = tracked(tmp_path / "sgdm", lambda model: torch.optim.SGD(parameters(model), lr=0.05, momentum=0.9))
    first = momentum["step"] == 1
    assert momentum.loc[first, "sgd_identity_error"].max() < 1e-5
    assert momentum.loc[~first, "sgd_identity_error"].min() > 0.1
