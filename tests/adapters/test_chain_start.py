"""How a chain starts: delta, the distribution of its factors, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from linchain_analysis.adapters import LinChainConfig, read_factors
from linchain_analysis.adapters.initialisation import draw_inner_factors
from linchain_analysis.method_names import CHAIN_INITS

SHAPES = [{"chain_length": 3}, {"chain_length": 2, "chain_width": 6}, {"chain_length": 1}, {"chain_length": 0}]


@pytest.mark.parametrize("shape", SHAPES)
def test_delta_is_exactly_zero(case, build: Callable, layers_of: Callable, shape: dict) -> None:
    lora = get_peft_model(build(case), LoraConfig(r=4, target_modules=case.targets))
    model = get_peft_model(build(case), LinChainConfig(r=4, target_modules=case.targets, **shape))
    # Bit by bit what LoRA computes; torch itself rounds otherwise in a base model that does not train.
    assert torch.equal(case.run(model), case.run(lora))
    torch.testing.assert_close(case.run(model), case.run(build(case)), rtol=0, atol=1e-5)
    layers = layers_of(model)
    assert layers
    assert all(not layer.get_delta_weight("default").any() for layer in layers)


@pytest.mark.parametrize("shape", SHAPES)
def test_outer_factors_are_loras_under_the_same_seed(case, build: Callable, layers_of: Callable, shape: dict) -> None:
    """The inner factors take nothing from the global random stream."""
    models, states = [], []
    for config in (
        LinChainConfig(r=4, target_modules=case.targets, **shape),
        LoraConfig(r=4, target_modules=case.targets),
    ):
        model = build(case)
        torch.manual_seed(11)
        models.append(get_peft_model(model, config))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for chain, lora in zip(*map(layers_of, models), strict=True):
        ours, theirs = read_factors(chain, "default"), read_factors(lora, "default")
        assert [name for name, _, _ in ours] == ["A", *[f"W{i + 1}" for i in range(shape["chain_length"])], "B"]
        assert torch.equal(ours[0][1], theirs[0][1])
        assert torch.equal(ours[-1][1], theirs[-1][1])


def inner_factors(seed: int, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), LinChainConfig(r=4, target_modules=["0", "1"], **options)
    )
    return [p for n, p in model.named_parameters() if ".W" in n]


def test_same_seed_same_factors_and_no_two_alike() -> None:
    first, again, other = inner_factors(1), inner_factors(1), inner_factors(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(factor.flatten().tolist()) for factor in first}) == len(first) == 6


@pytest.mark.parametrize(("init", "gain"), [("kaiming", 1 / math.sqrt(3)), ("he", math.sqrt(2)), ("lecun", 1.0)])
def test_uniform_inits_have_their_gain(init: str, gain: float) -> None:
    _, factor = draw_inner_factors((300, 200, 300), init, seed=5)
    assert factor.shape == (300, 200)
    bound = gain * math.sqrt(3 / 200)
    assert factor.abs().max() <= bound
    # 60,000 draws: the largest is within 1e-3 of the bound but for one case in e^60, the deviation within 1 %.
    assert factor.abs().max() > bound * (1 - 1e-3)
    assert float(factor.std()) == pytest.approx(gain / math.sqrt(200), rel=0.01)


def test_kaiming_is_the_init_of_a_linear_layer() -> None:
    """gain 1/√3 means the bound 1/√fan_in."""
    (factor,) = draw_inner_factors((4, 4), "kaiming", seed=0)
    assert factor.abs().max() <= 0.5
    assert {init: len(draw_inner_factors((4,), init, 0)) for init in CHAIN_INITS} == dict.fromkeys(CHAIN_INITS, 0)


def test_orthogonal_and_identity() -> None:
    narrow, wide = draw_inner_factors((8, 16, 8), "orthogonal", seed=0)
    torch.testing.assert_close(narrow.t() @ narrow, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide @ wide.t(), torch.eye(8), rtol=0, atol=1e-5)
    narrow, wide = draw_inner_factors((8, 16, 8), "identity", seed=0)
    assert torch.equal(narrow, torch.eye(16, 8))
    assert torch.equal(wide @ narrow, torch.eye(8))


def test_identity_chain_is_lora() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 7)),
        LinChainConfig(r=3, target_modules=["0"], chain_init="identity", init_lora_weights=False),
    )
    chain = model.base_model.model[0].lora_A["default"]
    assert torch.equal(chain.weight, chain.A)


@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_start_of_the_outer_factors_is_loras_option(start: bool | str) -> None:
    first = []
    for cls in (LinChainConfig, LoraConfig):
        torch.manual_seed(4)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), cls(r=3, target_modules=["0"], init_lora_weights=start))
        factors = read_factors(model.base_model.model[0], "default")
        first.append((factors[0][1], factors[-1][1]))
    assert torch.equal(first[0][0], first[1][0])
    assert torch.equal(first[0][1], first[1][1])
    assert bool(first[0][1].any()) is (start is False)


def test_widths_follow_the_rank_of_the_module() -> None:
    config = LinChainConfig(
        r=4, chain_length=2, target_modules=["0", "1"], rank_pattern={"1": 2}, alpha_pattern={"1": 6}
    )
    model = get_peft_model(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), config)
    shapes = [[tuple(p.shape) for _, p, _ in read_factors(layer, "default")] for layer in model.base_model.model]
    assert shapes == [[(4, 5), (4, 4), (4, 4), (5, 4)], [(2, 5), (2, 2), (2, 2), (5, 2)]]
    assert [layer.scaling["default"] for layer in model.base_model.model] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"chain_length": 0}, (8,)),
        ({"chain_length": 1}, (8, 8)),
        ({"chain_length": 2, "chain_width": 16}, (8, 16, 8)),
        ({"chain_length": 4, "chain_width": 3}, (8, 3, 3, 3, 8)),
        ({"chain_length": 3}, (8, 8, 8, 8)),
    ],
)
def test_widths(options: dict, widths: tuple[int, ...]) -> None:
    assert LinChainConfig(r=8, **options).widths(8) == widths
