"""Which layers are found, under which names, and which are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from linchain_analysis import LinChainConfig, method_config
from linchain_analysis.probes import Chain, ChainReader, find_chains


class Odd(nn.Module):
    """One of everything that LoRA adapts besides linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(12, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 8, (3, 2), stride=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.embed(x).mT)  # (batch, 16, length)
        image = self.pointwise(self.conv2(h[:, None]))
        return self.linear(h.mean(dim=2)).sum() + image.square().mean()


def read_one_step(model: nn.Module, loss: Any) -> tuple[list[Chain], Any]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    chains = find_chains(model, optimizer)
    reader = ChainReader(chains)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        reader.read_gradients()
        reader.read_before()
        optimizer.step()
        reading, _ = reader.read_after()
    return chains, reading


@pytest.mark.parametrize("config", [LoraConfig, LinChainConfig])
def test_embeddings_and_convolutions_equal_their_delta_weight(config: Any) -> None:
    torch.manual_seed(0)
    targets = ["embed", "conv1", "conv2", "pointwise", "linear"]
    model = get_peft_model(Odd(), config(r=4, lora_alpha=8, target_modules=targets))
    x = torch.randint(0, 20, (6, 9))
    chains, reading = read_one_step(model, lambda: model(x))
    assert [chain.module for chain in chains] == targets
    for chain, sigma in zip(chains, reading.delta_spectrum, strict=True):
        delta = getattr(model.base_model.model, chain.module).get_delta_weight("default").detach().flatten(1).double()
        expected = np.linalg.svd(delta.numpy(), compute_uv=False)
        assert expected[0] > 0
        # get_delta_weight multiplies in float32
        np.testing.assert_allclose(sigma, expected[: len(sigma)], rtol=0, atol=2e-6 * expected[0])


def test_a_parameter_targeted_by_name_is_read_like_a_layer() -> None:
    torch.manual_seed(0)
    config = LinChainConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["linear.weight"])
    model = get_peft_model(Odd(), config)
    chains, reading = read_one_step(model, lambda: model(torch.randint(0, 20, (6, 9))))
    assert [(chain.module, chain.kind) for chain in chains] == [("linear.weight", "weight")]
    layer = model.base_model.model.linear
    expected = np.linalg.svd(layer.get_delta_weight("default").detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(reading.delta_spectrum[0], expected[:4], rtol=0, atol=2e-6 * expected[0])


def test_names_are_those_of_the_base_model_through_every_wrapper() -> None:
    base_names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]

    def names(model: nn.Module) -> list[str]:
        return [chain.module for chain in find_chains(model)]

    config = method_config("lora-4", target_modules=["q_proj"])
    peft_model = get_peft_model(small_models.llama(), config)
    assert names(peft_model) == base_names
    assert names(peft_model.base_model) == base_names
    assert names(torch.compile(peft_model)) == base_names
    assert names(nn.DataParallel(peft_model)) == base_names
    assert names(nn.ModuleDict({"policy": peft_model})) == base_names
    inside = small_models.llama()
    inside.add_adapter(method_config("linchain-3-4", target_modules=["q_proj"]))
    assert names(inside) == base_names
    assert [(chain.kind, chain.layer) for chain in find_chains(inside)] == [("q_proj", 0), ("q_proj", 1)]


def test_several_adapters_on_a_layer_are_told_apart() -> None:
    config = method_config("lora-4", target_modules=["q_proj"])
    model = get_peft_model(small_models.llama(num_hidden_layers=1), config, adapter_name="first")
    model.add_adapter("second", config)
    assert [chain.module for chain in find_chains(model)] == ["model.layers.0.self_attn.q_proj"]
    model.base_model.set_adapter(["first", "second"])
    assert [chain.module for chain in find_chains(model)] == [
        "model.layers.0.self_attn.q_proj@first",
        "model.layers.0.self_attn.q_proj@second",
    ]


def only_reason(model: nn.Module) -> str:
    (reason,) = {chain.refused for chain in find_chains(model)}
    assert reason is not None
    return reason


def test_what_is_no_product_is_refused_by_name_and_its_factors_are_still_read() -> None:
    dora = get_peft_model(small_models.llama(), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    assert "DoRA" in only_reason(dora)
    batch = small_models.batch("llama")
    chains, reading = read_one_step(dora, lambda: dora(**batch).loss)
    assert [factor.name for factor in chains[0].factors] == ["A", "B", "lora_magnitude_vector"]
    assert (reading.per_chain("update_norm")[0] > 0).all()
    assert reading.delta_spectrum[0] is None
    assert np.isnan(reading.delta_norm[0])

    loha = get_peft_model(small_models.llama(), LoHaConfig(target_modules=["q_proj"]))
    assert "LoHa" in only_reason(loha) or "loha" in only_reason(loha)
    chains, reading = read_one_step(loha, lambda: loha(**batch).loss)
    assert (reading.per_chain("grad_norm")[0] > 0).any()

    grouped = get_peft_model(nn.Sequential(nn.Conv1d(8, 8, 3, groups=4)), LoraConfig(r=4, target_modules=["0"]))
    assert "4 groups" in only_reason(grouped)

    trained_base = get_peft_model(small_models.llama(), LoraConfig(target_modules=["q_proj"]))
    trained_base.base_model.model.requires_grad_(True)
    assert "base weight trains" in only_reason(trained_base)


def test_frozen_adapters_are_left_out() -> None:
    model = get_peft_model(small_models.llama(), method_config("lora-4", target_modules=["q_proj"]))
    model.requires_grad_(False)
    assert find_chains(model) == []
    assert find_chains(small_models.llama()) == []
