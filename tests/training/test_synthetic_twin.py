"""Stacks of chains against an independent implementation in torch, and against an independent implementation's medians.

The twin below shares nothing with the package: its loss is written with labels, its gradients come from autograd and
its optimisers from torch. `MEDIANS` are published numbers of a third implementation, whose draws are not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factors
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic import ADAM_RATES, GD_RATES, OptimizerSettings
from linchain_analysis.training.synthetic.batch import ChainStack, train_chains

Floats = NDArray[np.float64]
RANK = 8
LEVEL = 1e-3  # of the loss, relative to that of ΔW = 0


def draw_chains(seeds: range, num_inner: int, init: str, dim: int = 64) -> list[Floats]:
    drawn = []
    for seed in seeds:
        first, inner = (np.random.default_rng([seed, part]) for part in (10, 11))
        widths = [RANK] * (num_inner + 1)
        drawn.append([draw_first_factor(dim, RANK, first), *draw_inner_factors(widths, init, inner)])
    return [*(np.stack(factors) for factors in zip(*drawn, strict=True)), np.zeros((len(seeds), RANK, dim))]


def draw_normal_shears(seeds: range, dim: int = 64) -> LinearMaps:
    """Targets U · blockdiag(S_k R_k) · Vᵀ with standard normal shears: effective rank 7.2 ± 0.4, published 7.3."""
    targets = []
    for seed in seeds:
        generator = np.random.default_rng([seed, 12])
        middle = np.zeros((RANK, RANK))
        for k in range(0, RANK, 2):
            angle = generator.uniform(0, 2 * math.pi)
            cos, sin = math.cos(angle), math.sin(angle)
            middle[k : k + 2, k : k + 2] = np.array([[1, generator.normal()], [0, 1]]) @ [[cos, sin], [-sin, cos]]
        u, v = (np.linalg.qr(generator.standard_normal((dim, RANK)))[0] for _ in range(2))
        targets.append(u @ middle @ v.T)
    return LinearMaps(np.stack(targets))


def torch_curves(
    problem: LinearMaps, factors: list[Floats], optimizer: str, rate: float, num_steps: int, decay: float = 0.0
) -> Floats:
    """Losses (K, num_steps) before each step, one map for each chain; `decay` is the covariance's exponent."""
    parameters = [torch.tensor(factor, requires_grad=True) for factor in factors]
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "gd": lambda: torch.optim.SGD(parameters, lr=rate),
        "momentum": lambda: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters, lr=rate),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
    }
    dim, count = factors[0].shape[1], 1
    inputs = torch.diag(torch.arange(1, dim + 1, dtype=torch.float64) ** (-decay / 2))
    if problem.design is not None:
        inputs, count = torch.tensor(problem.design), problem.design.shape[1]
    labels = inputs @ torch.tensor(problem.targets)
    if problem.noise is not None:
        labels = labels + torch.tensor(problem.noise)
    seen = torch.tensor(1.0) if problem.observed is None else torch.tensor(problem.observed).double()
    stepper, curves = make[optimizer](), []
    for _ in range(num_steps):
        delta = parameters[0]
        for factor in parameters[1:]:
            delta = delta @ factor
        errors = (inputs @ delta - labels) * seen
        losses = (errors**problem.power / problem.power).sum(dim=(1, 2)) / count
        curves.append(losses.detach().numpy())
        stepper.zero_grad()
        losses.sum().backward()
        stepper.step()
    return np.stack(curves, axis=1)


# Over 60 steps the two differ by rounding: 4e-15 was measured for the first two, 8e-13 for Adam, which divides by the
# root of second moments near 0. Later, and at rates on the edge of stability, rounding grows without bound in either:
# one unit in the last place of A moves the twin's own curve as much.
@pytest.mark.parametrize(
    ("optimizer", "rate", "tolerance"),
    [("gd", 2**-4, 1e-13), ("momentum", 2**-7, 1e-13), ("adam", 2**-5, 1e-10), ("adamw", 2**-5, 1e-10)],
)
@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
@pytest.mark.parametrize("num_inner", range(5))
def test_curves_are_those_of_autograd_and_torch_optim(
    num_inner: int, init: str, optimizer: str, rate: float, tolerance: float
) -> None:
    assert_one_curve(MapSetting(), num_inner, init, optimizer, rate, tolerance)


SETTINGS = {
    "quartic": MapSetting(loss="quartic"),
    "noise": MapSetting(label_noise=0.1),
    "samples": MapSetting(num_samples=160, label_noise=0.5),
    "few samples": MapSetting(num_samples=40),
    "completion": MapSetting(observed=0.3),
    "ill-conditioned": MapSetting(input_decay=1.0),
    "all": MapSetting(num_samples=80, label_noise=0.2, observed=0.5, input_decay=1.0, loss="quartic"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("optimizer", "rate", "tolerance"), [("gd", 2**-4, 1e-13), ("adam", 2**-5, 1e-10)], ids=["gd", "adam"]
)
def test_curves_agree_on_every_kind_of_data(name: str, optimizer: str, rate: float, tolerance: float) -> None:
    assert_one_curve(SETTINGS[name], 2, "orthogonal", optimizer, rate, tolerance)


def assert_one_curve(
    setting: MapSetting, num_inner: int, init: str, optimizer: str, rate: float, tolerance: float
) -> None:
    seeds = range(2)
    problem, factors = setting.draw(seeds), draw_chains(seeds, num_inner, init)
    stack = ChainStack(factors, np.arange(len(seeds)), np.full(len(seeds), rate))
    ours = train_chains(problem, stack, OptimizerSettings(optimizer), 60, num_threads=1).loss
    theirs = torch_curves(problem, factors, optimizer, rate, 60, setting.input_decay)
    assert (theirs[:, -1] < theirs[:, 0]).all()
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=0)


@dataclass(frozen=True)
class Published:
    """Steps to `LEVEL`, d = 64, r = 8, at the rate that most seeds reach it with, and of these the fastest.

    Attributes:
        optimizer: `adam` or `gd`.
        init: Of the inner factors.
        num_inner: How many there are.
        median: Over 10 seeds, unreached ones counted as Inf.
        reached: Share of the seeds that reached it in 800 steps.
        medians: Where the median of 10 seeds lies in 99 % of 4,000 bootstrap samples of the twin's 40 seeds (20 where
            `orthogonal`), the rate chosen anew in each, with standard normal shears.
        shares: Where the share of seeds lies in the same samples.
    """

    optimizer: str
    init: str
    num_inner: int
    median: float
    reached: float
    medians: tuple[float, float]
    shares: tuple[float, float] = (1.0, 1.0)


# Interval of 99 %, so that all sixteen hold together more often than not. Shears between 0.5 and 1.5 leave Adam where
# it is but let GD take twice the rate, and the published medians of GD are then out of reach: 64 against [22, 35].
MEDIANS = [
    Published("adam", "kaiming", 0, 58, 1.0, (57, 58.5)),
    Published("adam", "kaiming", 1, 84, 1.0, (72, 163.5)),
    Published("adam", "kaiming", 2, 260, 1.0, (131, 508), (0.8, 1.0)),
    Published("adam", "kaiming", 3, 578, 0.6, (407, math.inf), (0.1, 0.8)),
    Published("adam", "kaiming", 4, math.inf, 0.1, (math.inf, math.inf), (0.0, 0.2)),
    Published("adam", "orthogonal", 1, 57, 1.0, (56, 60)),
    Published("adam", "orthogonal", 2, 58, 1.0, (55, 64)),
    Published("adam", "orthogonal", 3, 56, 1.0, (53, 72)),
    Published("adam", "orthogonal", 4, 63, 1.0, (55, 79)),
    Published("gd", "kaiming", 0, 64, 1.0, (43, 67)),
    Published("gd", "kaiming", 1, 476, 0.9, (164, 758), (0.6, 1.0)),
    Published("gd", "kaiming", 2, math.inf, 0.2, (math.inf, math.inf), (0.0, 0.2)),
    Published("gd", "orthogonal", 1, 135, 1.0, (81.5, 146)),
    Published("gd", "orthogonal", 2, 133, 1.0, (82.5, 279)),
    Published("gd", "orthogonal", 3, 250, 1.0, (106, 277.5), (0.7, 1.0)),
    Published("gd", "orthogonal", 4, 239, 1.0, (160, 552.5), (0.7, 1.0)),
]


# As the intervals were made. From 2⁻⁶ down every octave is slower and reaches the level with fewer seeds, or with all.
RATES = {"adam": ADAM_RATES[5:], "gd": GD_RATES}


def name_case(case: Published) -> str:
    return f"{case.optimizer}-{case.init}-{case.num_inner}"


def count_steps(problem: LinearMaps, case: Published, rates: tuple[float, ...], num_steps: int) -> Floats:
    """Steps to `LEVEL`, (rates, seeds); Inf where it is not reached."""
    seeds = range(len(problem))
    factors = [np.tile(factor, (len(rates), 1, 1)) for factor in draw_chains(seeds, case.num_inner, case.init)]
    index = np.tile(np.arange(len(seeds)), len(rates))
    stack = ChainStack(factors, index, np.repeat(np.array(rates), len(seeds)))
    trained = train_chains(problem, stack, OptimizerSettings(case.optimizer), num_steps)
    low = trained.population_loss <= LEVEL * problem.target_losses[index, None]  # False after a divergence
    steps = np.where(low.any(axis=1), low.argmax(axis=1), np.inf)
    return steps.reshape(len(rates), len(seeds))


def choose(steps: Floats) -> tuple[float, float]:
    """Median and share of seeds at the rate that most seeds reach the level with, then fewest median steps."""
    best = min(steps, key=lambda row: (-np.isfinite(row).mean(), median(row)))
    return median(best), float(np.isfinite(best).mean())


def median(row: Floats) -> float:
    low, high = np.sort(row)[[(len(row) - 1) // 2, len(row) // 2]]
    return float((low + high) / 2)


# 200 steps in place of 800 are enough where the interval ends far below; `kaiming` with one inner factor has seeds
# that take more, and is left to the slow tests.
FAST = [case for case in MEDIANS if case.optimizer == "adam" and case.medians[1] < 100]


@pytest.mark.parametrize("case", FAST, ids=name_case)
@pytest.mark.parametrize("shears", ["normal", "of the package"])
def test_adam_takes_the_published_number_of_steps_near_its_best_rate(shears: str, case: Published) -> None:
    seeds = range(10)
    problem = draw_normal_shears(seeds) if shears == "normal" else MapSetting().draw(seeds)
    found, reached = choose(count_steps(problem, case, (2**-5, 2**-4), 200))
    assert reached == case.reached
    assert case.medians[0] <= found <= case.medians[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", MEDIANS, ids=name_case)
def test_medians_at_the_best_of_all_rates(case: Published) -> None:
    found, reached = choose(count_steps(draw_normal_shears(range(20)), case, RATES[case.optimizer], 800))
    for value, share in ((found, reached), (case.median, case.reached)):
        assert case.medians[0] <= value <= case.medians[1]
        assert case.shares[0] <= share <= case.shares[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in MEDIANS if case.optimizer == "adam" and case.num_inner < 3], ids=name_case
)
def test_adam_takes_as_many_steps_with_the_shears_of_the_package(case: Published) -> None:
    found, reached = choose(count_steps(MapSetting().draw(range(20)), case, RATES["adam"], 800))
    assert case.medians[0] <= found <= case.medians[1]
    assert case.shares[0] <= reached <= case.shares[1]


def test_one_chain_reaches_the_level_in_the_twins_step() -> None:
    seeds = range(4)
    problem, case = draw_normal_shears(seeds), Published("adam", "orthogonal", 3, 56, 1.0, (53, 72))
    curves = torch_curves(problem, draw_chains(seeds, case.num_inner, case.init), "adam", 2**-5, 100)
    twin = (curves <= LEVEL * curves[:, :1]).argmax(axis=1)
    assert (twin > 0).all()
    np.testing.assert_array_equal(count_steps(problem, case, (2**-5,), 100)[0], twin)
