"""What a chain cannot do is refused by name, when the configuration or the model is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from linchain_analysis.adapters import LinChainConfig
from linchain_analysis.errors import InputError, UnsupportedError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"^r: expected an integer of 1 or more, got 0;"),
        ({"r": -2}, r"^r: .*got -2;"),
        ({"r": True}, r"^r: .*got True;"),
        ({"r": 4.0}, r"^r: .*got 4\.0;"),
        ({"r": None}, r"^r: .*got None;"),
        ({"chain_length": -1}, r"^chain_length: expected an integer of 0 or more, got -1;"),
        ({"chain_length": False}, r"^chain_length: .*got False;"),
        ({"chain_length": 2.5}, r"^chain_length: .*got 2\.5;"),
        ({"chain_length": "3"}, r"^chain_length: .*got '3';"),
        ({"chain_width": 0}, r"^chain_width: .*got 0;"),
        ({"chain_width": "16"}, r"^chain_width: .*got '16';"),
        ({"chain_length": 1, "chain_width": 16}, r"^chain_width: expected None or r = 8 for chain_length=1.*got 16;"),
        ({"chain_length": 0, "chain_width": 4}, r"^chain_width: expected None or r = 8 for chain_length=0.*got 4;"),
        ({"rank_pattern": {"q": 0}}, r"^rank_pattern\['q'\]: .*got 0;"),
        ({"chain_init": "kaimin"}, r"^chain_init: .*got 'kaimin'; did you mean 'kaiming'\."),
        ({"chain_init": "Ortho"}, r"^chain_init: .*got 'Ortho'; did you mean 'orthogonal'\."),
        ({"chain_init": "zzz"}, r"^chain_init: expected one of kaiming, he, lecun, .*got 'zzz'; choose"),
        ({"chain_init": None}, r"^chain_init: .*got None"),
    ],
)
def test_bad_values(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinChainConfig(**options)


VARIANTS = [
    ("use_dora", True),
    ("velora_config", {"num_groups": 2}),
    ("alora_invocation_tokens", [1]),
    ("monteclora_config", {"num_samples": 2}),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 1}),
    ("kasa_config", {"beta": 0.1}),
    ("use_qalora", True),
    ("megatron_config", {"a": 1}),
]


@pytest.mark.parametrize(("option", "value"), VARIANTS)
def test_variants(option: str, value: object) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"^{option}: .*got {str(value)[:5].replace('{', '.').replace('[', '.')}"
    ):
        LinChainConfig(**{option: value})


def test_every_variant_that_peft_marks_is_among_them() -> None:
    from dataclasses import fields

    marked = {option.name for option in fields(LoraConfig) if option.metadata.get("is_lora_variant")}
    assert marked <= {option for option, _ in VARIANTS}


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica", "orthogonal", "typo", None]
)
def test_initialisations(start: object) -> None:
    with pytest.raises(UnsupportedError, match=f"^init_lora_weights: .*got {start!r};"):
        LinChainConfig(init_lora_weights=start)


def test_refusals_are_the_errors_that_peft_raises() -> None:
    for kind in (ValueError, NotImplementedError):
        with pytest.raises(kind):
            LinChainConfig(use_dora=True)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.sum(0)


def test_parameters_of_several_experts() -> None:
    config = LinChainConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    with pytest.raises(UnsupportedError, match=r"^0\.weight: .*got 3 experts in one parameter of shape \(3, 4, 5\)"):
        get_peft_model(nn.Sequential(Experts()), config)


def test_targets() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LinChainConfig(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="LayerNorm"):
        get_peft_model(nn.Sequential(nn.LayerNorm(2)), LinChainConfig(target_modules=["0"]))


def test_mixed_models() -> None:
    with pytest.raises(ValueError, match=r"LINCHAIN.*PeftMixedModel"):
        PeftMixedModel(nn.Sequential(nn.Linear(2, 2)), LinChainConfig(target_modules=["0"]))


def test_hotswap(stir: Callable, tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LinChainConfig(target_modules=["0"]))
    stir(model)
    model.save_pretrained(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="LINCHAIN"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_method_beside_it() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LinChainConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"LINCHAIN.*LORA"):
        model.add_adapter("lora", LoraConfig(target_modules=["0"]))


def test_writing_the_product_is_refused() -> None:
    chain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LinChainConfig(target_modules=["0"]))
    with pytest.raises((AttributeError, KeyError)):
        chain.base_model.model[0].lora_A["default"].weight = nn.Parameter(torch.zeros(8, 2))
