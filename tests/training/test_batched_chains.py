"""Stacks of chains: the optimisers of torch, chains that do not feel each other, divergence, and symmetries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from linchain_analysis import method_config
from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import spectrum
from linchain_analysis.measures.theory.gradients import multiply_chain
from linchain_analysis.probes.chains import find_chains
from linchain_analysis.problems.synthetic import LinearMaps, MapSetting
from linchain_analysis.training.synthetic import batch
from linchain_analysis.training.synthetic.batch import ChainStack, Moment, Trained, train_chains
from linchain_analysis.training.synthetic.optimizers import OPTIMIZERS, OptimizerSettings

CURVES = ("loss", "excess_loss", "population_loss", "grad_norm", "diverged_at")
TORCH: dict[str, Any] = {
    "gd": lambda groups: torch.optim.SGD(groups),
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups),
}
SQUARE = {"dim": 6, "dim_out": 7, "target_rank": 3}
PROBLEMS: dict[str, dict[str, Any]] = {
    "whitened": {},
    "quartic": {"loss": "quartic", "input_decay": 0.5},
    "samples": {"num_samples": 9, "label_noise": 0.5, "observed": 0.7},
    "stream": {"batch_size": 5, "label_noise": 0.5, "input_decay": 1.0},
}


def draw_stack(
    dims: Sequence[int], rates: Sequence[float], num_maps: int = 1, *, zero: bool = False, **options: Any
) -> ChainStack:
    """A chain of random factors for each map and rate, the maps mixed; B is 0 on demand."""
    count = num_maps * len(rates)
    generator = np.random.default_rng(11)
    factors = [generator.standard_normal((count, *shape)) / math.sqrt(shape[0]) for shape in pairwise(dims)]
    if zero:
        factors[-1][:] = 0.0
    index = np.tile(np.arange(num_maps), len(rates))
    return ChainStack(factors, index, np.repeat(np.asarray(rates, float), num_maps), **options)


def pick(stack: ChainStack, chains: Sequence[int]) -> ChainStack:
    chosen = list(chains)
    return replace(
        stack,
        factors=[factor[chosen] for factor in stack.factors],
        index=stack.index[chosen],
        learning_rate=stack.learning_rate[chosen],
    )


def torch_loss(problem: LinearMaps, k: int, step: int, delta: torch.Tensor) -> torch.Tensor:
    """From inputs and labels, as a training script has them."""
    now = problem.at_step(step)
    variances = now.covariance if len(now.covariance) else np.ones(problem.shape[0])
    inputs = np.diag(np.sqrt(variances)) if now.design is None else now.design[k]
    labels = inputs @ now.targets[k] + (0 if now.noise is None else now.noise[k])
    error = torch.tensor(inputs) @ delta - torch.tensor(labels)
    if now.observed is not None:
        error = error[torch.tensor(now.observed[k])]
    return (error**now.power).sum() / now.power / (1 if now.design is None else len(inputs))


def train_in_torch(
    problem: LinearMaps, stack: ChainStack, chain: int, name: str, num_steps: int
) -> tuple[list[float], list[float], list[np.ndarray]]:
    """Losses, norms of the gradient over what trains, and the factors at the end."""
    factors = [torch.tensor(factor[chain], requires_grad=True) for factor in stack.factors]
    groups = [{"params": [f], "lr": float(rate)} for f, rate in zip(factors, stack.rates[chain], strict=True) if rate]
    optimizer = TORCH[name](groups)
    losses, norms = [], []
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        delta = factors[0]
        for factor in factors[1:]:
            delta = delta @ factor
        loss = torch_loss(problem, int(stack.index[chain]), step, stack.scale * delta)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(math.sqrt(sum(float((f.grad**2).sum()) for group in groups for f in group["params"])))
    return losses, norms, [factor.detach().numpy() for factor in factors]


def assert_same(one: Trained, other: Trained, chains: Sequence[int] | slice = slice(None)) -> None:
    """To the last bit; NaN is like NaN."""
    for name in CURVES:
        np.testing.assert_array_equal(getattr(one, name)[chains], getattr(other, name), err_msg=name)
    for i, (factor, twin) in enumerate(zip(one.factors, other.factors, strict=True)):
        np.testing.assert_array_equal(factor[chains], twin, err_msg=f"factor {i}")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("widths", [(4,), (4, 4), (4, 8, 4), (4, 4, 4, 4), (3, 3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_steps_are_those_of_torch(name: str, widths: tuple[int, ...], kind: str) -> None:
    problem = MapSetting(**SQUARE, **PROBLEMS[kind]).draw([0, 1])
    odd = len(widths) % 2 == 1
    frozen = [True] * len(widths) + [False] if kind == "samples" and odd else None
    ratio = [1.0] * len(widths) + [4.0] if kind == "whitened" and odd else None
    stack = draw_stack((6, *widths, 7), [0.02, 0.004], 2, scale=2.0 if odd else 1.0, trained=frozen, rate_factors=ratio)
    result = train_chains(problem, stack, OptimizerSettings(name), 30)
    losses, norms, factors = train_in_torch(problem, stack, 3, name, 30)
    np.testing.assert_allclose(result.loss[3], losses, rtol=1e-12)
    np.testing.assert_allclose(result.grad_norm[3], norms, rtol=1e-12)
    for factor, twin in zip(result.factors, factors, strict=True):
        np.testing.assert_allclose(factor[3], twin, rtol=0, atol=1e-12 * np.abs(twin).max())
    if frozen:
        np.testing.assert_array_equal(result.factors[-1], stack.factors[-1])


@pytest.mark.parametrize("method", ["lora-4", "moslora-4", "linchain-2-4-w8"])
def test_steps_are_those_of_the_peft_method(method: str) -> None:
    problem = MapSetting(**SQUARE).draw([0])
    model = nn.Sequential(nn.Linear(6, 7, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    torch.manual_seed(0)
    adapted = get_peft_model(model, method_config(method, target_modules=["0"]), autocast_adapter_dtype=False)
    (chain,) = find_chains(adapted)
    parameters = [factor.parameter for factor in chain.factors]
    assert all(parameter.dtype == torch.float64 for parameter in parameters)
    start = [parameter.detach().numpy().T[None].copy() for parameter in parameters]
    assert not start[-1].any()
    stack = ChainStack(start, np.zeros(1, dtype=np.intp), np.array([0.02]), scale=2.0)  # alpha = 2 r
    result = train_chains(problem, stack, OptimizerSettings("adam"), 30)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((adapted(torch.eye(6, dtype=torch.float64)) - torch.tensor(problem.targets[0])) ** 2).sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(result.loss[0], losses, rtol=1e-12)
    for factor, parameter in zip(result.factors, parameters, strict=True):
        np.testing.assert_allclose(factor[0], parameter.detach().numpy().T, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "dims", [(5, 3, 4), (5, 3, 3, 4), (1, 1, 1, 1), (9, 3, 5, 3, 2), (24, 8, 8, 8, 8, 8, 8, 8, 24)], ids=str
)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_chain_alone_is_the_chain_in_a_stack(
    name: str, dims: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = MapSetting(dim=dims[0], dim_out=dims[-1], target_rank=3, **PROBLEMS[kind]).draw([0, 1, 2])
    # 1e5 makes every optimiser of momentum or none diverge; 1e60 makes Adam's product overflow.
    stack = draw_stack(dims, [0.01, 1e5, 0.0, 1e60, 0.03], 3)
    settings = OptimizerSettings(name)
    together = train_chains(problem, stack, settings, 12)
    assert (together.diverged_at > 0).any() and (together.diverged_at == 0).any()
    for chain in range(0, 15, 2):
        assert_same(together, train_chains(problem, pick(stack, [chain]), settings, 12), [chain])
    order = [7, 0, 14, 3, 9]
    assert_same(together, train_chains(problem, pick(stack, order), settings, 12), order)
    monkeypatch.setattr(batch, "_PIECE_BYTES", 4 * 8 * dims[0] * dims[-1])  # four chains
    seen: list[tuple[int, int]] = []

    def observe(moment: Moment) -> None:
        assert [len(factor) for factor in moment.after] == [len(moment.chains)] * (len(dims) - 1)
        seen.extend((moment.step, int(chain)) for chain in moment.chains)

    pieces = train_chains(problem, stack, settings, 12, observe=observe, observe_at=lambda s: s % 3 == 0, num_threads=3)
    assert_same(together, pieces)
    last = np.where(together.diverged_at > 0, together.diverged_at - 1, 12)
    assert sorted(seen) == sorted((s, k) for s in (3, 6, 9, 12) for k in range(15) if s <= last[k])


def test_what_an_observer_sees_is_the_step() -> None:
    problem = MapSetting(**SQUARE).draw([0, 1])
    stack = draw_stack((6, 4, 4, 7), [0.01, 0.05], 2)
    moments: list[Moment] = []

    def keep(moment: Moment) -> None:
        copies = [[array.copy() for array in part] for part in (moment.before, moment.after, moment.gradients)]
        moments.append(Moment(moment.step, moment.chains.copy(), *copies))

    result = train_chains(problem, stack, OptimizerSettings("gd"), 5, observe=keep, num_threads=1)
    assert [moment.step for moment in moments] == [1, 2, 3, 4, 5]
    for moment in moments:
        rates = stack.learning_rate[moment.chains][:, None, None]
        for before, after, gradient in zip(moment.before, moment.after, moment.gradients, strict=True):
            np.testing.assert_array_equal(after, before - rates * gradient)
        norm = np.sqrt(sum((gradient**2).sum(axis=(1, 2)) for gradient in moment.gradients))
        np.testing.assert_allclose(result.grad_norm[moment.chains, moment.step - 1], norm, rtol=1e-14)
    for first, second in pairwise(moments):
        for after, before in zip(first.after, second.before, strict=True):
            np.testing.assert_array_equal(after, before)
    for start, factor, moved in zip(stack.factors, moments[0].before, result.factors, strict=True):
        np.testing.assert_array_equal(factor, start[moments[0].chains])
        assert not np.array_equal(moved, start)


def test_curves_by_hand() -> None:
    """ΔW = a b, T = 3, a = b = 1, rate 0.1: the residual is −2, so that both become 1.2; then −1.56, and 1.3872."""
    problem = LinearMaps(np.array([[[3.0]]]))
    stack = ChainStack([np.ones((1, 1, 1))] * 2, np.zeros(1, dtype=np.intp), np.array([0.1]))
    result = train_chains(problem, stack, OptimizerSettings("gd"), 2)
    np.testing.assert_allclose(result.loss, [[2.0, 1.56**2 / 2]], rtol=1e-14)
    np.testing.assert_allclose(result.excess_loss, [[2.0, 1.56**2 / 2, (3 - 1.3872**2) ** 2 / 2]], rtol=1e-14)
    np.testing.assert_array_equal(result.population_loss, result.excess_loss)
    np.testing.assert_allclose(result.grad_norm, [[2 * math.sqrt(2), 1.56 * 1.2 * math.sqrt(2)]], rtol=1e-14)
    np.testing.assert_allclose(np.ravel(result.factors), [1.3872, 1.3872], rtol=1e-14)


@pytest.mark.filterwarnings("error")
def test_a_diverging_chain_is_given_up_at_its_first_loss_that_is_not_finite() -> None:
    problem = MapSetting(**SQUARE).draw([0])
    stack = draw_stack((6, 4, 4, 7), [0.01, 3.0, 1e30, 0.02])
    losses, *_ = train_in_torch(problem, stack, 1, "gd", 20)
    step = next(step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss))
    assert 3 < step < 20
    result = train_chains(problem, stack, OptimizerSettings("gd"), 20)
    # The sum of squares of the gradient can overflow a step before the loss does.
    assert result.diverged_at[1] in (step - 1, step)
    assert (result.diverged_at[[0, 3]] == 0).all()
    for name in ("loss", "excess_loss", "population_loss", "grad_norm"):
        curve = getattr(result, name)[1]
        assert (
            np.isfinite(curve[: result.diverged_at[1] - 1]).all() and np.isnan(curve[result.diverged_at[1] - 1 :]).all()
        )
    short = train_chains(problem, stack, OptimizerSettings("gd"), int(result.diverged_at[1]) - 1)
    assert short.diverged_at[1] == result.diverged_at[1]  # the last step of this one led there
    assert np.isnan(short.excess_loss[1, -1]) and np.isfinite(short.loss[1]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflow_of_gradient_or_population_loss_alone(name: str) -> None:
    settings = OptimizerSettings(name)
    one = np.zeros(1, dtype=np.intp)
    # e = 1e60: the quartic loss is 1e240 / 4 and the square of its gradient 1e360.
    steep = LinearMaps(np.full((1, 1, 1), 1e60), power=4)
    ones = ChainStack([np.ones((1, 1, 1))] * 3, one, np.array([1e-3]))
    result = train_chains(steep, ones, settings, 3)
    assert result.diverged_at[0] == 1 and np.isnan(result.loss).all() and np.isnan(result.excess_loss).all()
    # One sample that does not see where ΔW is 1e160.
    blind = LinearMaps(np.zeros((1, 2, 1)), design=np.array([[[1.0, 0.0]]]))
    factors = [np.array([[[0.0], [1e160]]]), np.ones((1, 1, 1))]
    result = train_chains(blind, ChainStack(factors, one, np.array([1e-3])), settings, 3)
    assert result.diverged_at[0] == 0 and np.array_equal(result.loss, np.zeros((1, 3)))
    assert np.isposinf(result.population_loss).all() and np.array_equal(result.excess_loss, np.zeros((1, 4)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_target_stays_learned_and_no_steps_are_none(name: str) -> None:
    problem = MapSetting(dim=5, target_rank=0).draw([0])
    stack = draw_stack((5, 8, 8, 5), [0.1], zero=True)  # a rank above the dimension as well
    result = train_chains(problem, stack, OptimizerSettings(name), 4)
    assert not result.loss.any() and not result.excess_loss.any() and not result.grad_norm.any()
    none = train_chains(problem, stack, OptimizerSettings(name), 0)
    assert none.loss.shape == (1, 0) and none.excess_loss.shape == (1, 1)
    for factor, start in zip(none.factors, stack.factors, strict=True):
        np.testing.assert_array_equal(factor, start)


def test_a_rank_that_is_too_small_ends_at_the_smallest_loss() -> None:
    problem = MapSetting("spectrum", dim=4, spectrum=(3.0, 2.0, 1.0)).draw([0])
    stack = draw_stack((4, 2, 2, 4), [0.05])
    result = train_chains(problem, stack, OptimizerSettings("gd"), 3000)
    np.testing.assert_allclose(result.loss[0, -1], 0.5, rtol=1e-12)
    assert abs(result.excess_loss[0, -1]) < 1e-14


@pytest.mark.parametrize("name", ["gd", "momentum"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_gradient_descent_does_not_see_a_rotation_of_the_outputs(name: str, depth: int) -> None:
    rates = [0.02, 0.1] if name == "gd" else [0.002, 0.01]  # momentum 0.9 moves ten times as far
    stack = draw_stack((16, *[4] * (depth + 1), 16), rates, 3, zero=True)
    settings = OptimizerSettings(name)
    sheared, turned = (
        train_chains(MapSetting(kind, dim=16, target_rank=4).draw([0, 1, 2]), stack, settings, 60).loss
        for kind in ("shear", "shear-rotation")
    )
    assert sheared[:, -1].min() < 0.9 * sheared[:, 0].min()  # something was learned
    # The products of other numbers round differently (1e-16), and what leaves the saddle at B = 0 makes that grow.
    np.testing.assert_allclose(turned, sheared, rtol=1e-9)
    problem = MapSetting("spectrum", dim=16, label_noise=0.3, num_samples=10).draw([0, 1, 2])
    assert problem.noise is not None
    q = np.linalg.qr(np.random.default_rng(5).standard_normal((16, 16)))[0]
    rotated = replace(problem, targets=problem.targets @ q, noise=problem.noise @ q)
    expected = train_chains(problem, stack, settings, 60)
    got = train_chains(rotated, stack, settings, 60)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-9)  # as above
    np.testing.assert_allclose(got.factors[-1], expected.factors[-1] @ q, atol=1e-9 * np.abs(got.factors[-1]).max())


def test_adam_sees_a_rotation_of_the_outputs() -> None:
    stack = draw_stack((16, 4, 4, 16), [0.02], 3, zero=True)
    sheared, turned = (
        train_chains(MapSetting(kind, dim=16, target_rank=4).draw([0, 1, 2]), stack, OptimizerSettings("adam"), 60).loss
        for kind in ("shear", "shear-rotation")
    )
    assert (np.abs(turned[:, -1] / sheared[:, -1] - 1) > 1e-3).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_orthogonal_inner_factors_are_identities_behind_another_first_factor(name: str, depth: int) -> None:
    """(A, Q1 … Qn, 0) and (A Q1 … Qn, I … I, 0) are one chain in two gauges, both orthogonal: GD keeps them one."""
    problem = MapSetting(dim=16, target_rank=4).draw([0, 1])
    stack = draw_stack((16, *[4] * (depth + 1), 16), [0.05], 2, zero=True)
    inner = [np.linalg.qr(factor)[0] for factor in stack.factors[1:-1]]
    first, last = stack.factors[0], stack.factors[-1]
    orthogonal = replace(stack, factors=[first, *inner, last])
    eyes = [np.broadcast_to(np.eye(4), (2, 4, 4))] * depth
    identity = replace(stack, factors=[multiply_chain([first, *inner]), *eyes, last])
    one, other = (train_chains(problem, each, OptimizerSettings(name), 60).loss for each in (orthogonal, identity))
    assert one[:, -1].max() < 0.9 * one[:, 0].min()
    if name in ("gd", "momentum"):
        np.testing.assert_allclose(one, other, rtol=1e-9)  # rounding, grown while the saddle is left
    else:
        assert (np.abs(one[:, -1] / other[:, -1] - 1) > 1e-3).all()  # Adam's steps depend on the gauge


def test_another_gauge_is_the_same_delta_but_another_step() -> None:
    problem = MapSetting(dim=6, target_rank=3).draw([0])
    stack = draw_stack((6, 4, 4, 6), [0.05])
    m = np.random.default_rng(3).standard_normal((4, 4)) + 3 * np.eye(4)
    a, w, b = stack.factors
    regauged = replace(stack, factors=[a @ m, np.linalg.inv(m) @ w, b])
    np.testing.assert_allclose(
        spectrum(multiply_chain(list(regauged.factors))), spectrum(multiply_chain(list(stack.factors))), atol=1e-13
    )
    one, other = (train_chains(problem, each, OptimizerSettings("gd"), 2).loss[0] for each in (stack, regauged))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-12)
    assert abs(one[1] / other[1] - 1) > 1e-3


@pytest.mark.parametrize(
    ("options", "place", "do"),
    [
        ({"name": "adamm"}, "optimizer", "did you mean 'adam'"),
        ({"momentum": 1.0}, "momentum", ""),
        ({"beta1": -0.1}, "beta1", ""),
        ({"beta2": 1.0}, "beta2", ""),
        ({"epsilon": 0.0}, "epsilon", ""),
        ({"weight_decay": math.nan}, "weight_decay", ""),
    ],
)
def test_optimizers_that_are_refused(options: dict[str, Any], place: str, do: str) -> None:
    with pytest.raises(InputError) as caught:
        OptimizerSettings(**options)
    assert caught.value.place == place and do in caught.value.do


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("factors", {"factors": [np.ones((1, 3, 3))]}),
        ("factors", {"factors": [np.ones((1, 3, 2)), np.ones((1, 3, 3))]}),
        ("factors", {"factors": [np.ones((2, 3, 2)), np.ones((2, 2, 3))]}),
        ("factors", {"factors": [np.ones((1, 4, 2)), np.ones((1, 2, 3))]}),
        ("learning_rate", {"learning_rate": np.array([-0.1])}),
        ("learning_rate", {"learning_rate": np.array([math.inf])}),
        ("index", {"index": np.array([1])}),
        ("index", {"index": np.array([-1])}),
        ("index", {"index": np.array([0, 0])}),
        ("trained", {"trained": [True]}),
        ("rate_factors", {"rate_factors": [1.0, -1.0]}),
        ("scale", {"scale": math.nan}),
    ],
)
def test_stacks_that_are_refused(place: str, options: dict[str, Any]) -> None:
    good = {
        "factors": [np.ones((1, 3, 2)), np.ones((1, 2, 3))],
        "index": np.array([0]),
        "learning_rate": np.array([0.1]),
    }
    with pytest.raises(InputError) as caught:
        train_chains(MapSetting(dim=3).draw([0]), ChainStack(**{**good, **options}), OptimizerSettings(), 1)
    assert caught.value.place == place


@pytest.mark.parametrize("options", [{"num_steps": -1}, {"num_steps": 1.5}, {"num_steps": 1, "num_threads": 0}])
def test_counts_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="num_"):
        train_chains(MapSetting(dim=3).draw([0]), draw_stack((3, 2, 3), [0.1]), OptimizerSettings(), **options)


def test_an_exception_at_a_step_ends_the_training_there() -> None:
    problem = MapSetting(dim=4, target_rank=2).draw([0])
    factors = [np.ones((1, 4, 2)), np.zeros((1, 2, 4))]
    stack = ChainStack(factors, np.zeros(1, dtype=np.intp), np.array([0.1]))
    told: list[int] = []

    def stop(step: int) -> None:
        told.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_chains(problem, stack, OptimizerSettings("gd"), 1000, on_step=stop, num_threads=1)
    assert told == [1, 2, 3]
