"""A chain without inner factors is LoRA: trajectory, names, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from linchain_analysis.adapters import LinChainConfig, fold_to_lora, method_config
from linchain_analysis.adapters.layer import ChainLinear


def pair(case, build: Callable, **options: object) -> list[PeftModel]:
    """Return the model adapted with a chain of length 0 and with PEFT's LoRA, from the same seeds."""
    models = []
    for config in (LinChainConfig(chain_length=0, **options), LoraConfig(**options)):
        base = build(case)
        torch.manual_seed(5)
        models.append(get_peft_model(base.double(), config))
    return models


def train(case, model: nn.Module, num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of every step and the factors after the last."""
    torch.manual_seed(9)  # of dropout
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        logits = case.run(model).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_trajectory_is_loras(name: str, rank: int, dropout: float, build: Callable, cases: dict) -> None:
    case = cases[name]
    chain, lora = pair(case, build, r=rank, lora_alpha=7, lora_dropout=dropout, target_modules=case.targets)
    assert any(type(module) is ChainLinear for module in chain.modules())
    assert not any(type(module) is ChainLinear for module in lora.modules())
    (losses, factors), (expected_losses, expected_factors) = (train(case, model, 12) for model in (chain, lora))
    assert losses[-1] < losses[0] - 0.05
    # AdamW divides by the size of the gradient, which amplifies rounding where that is small.
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert factors.keys() == expected_factors.keys()
    for key, factor in factors.items():
        torch.testing.assert_close(factor, expected_factors[key], rtol=0, atol=1e-7)


def test_names_and_checkpoints_are_loras(build: Callable, cases: dict, stir: Callable, tmp_path: Path) -> None:
    case = cases["llama"]
    chain, lora = pair(case, build, r=4, target_modules=case.targets)
    stir(chain)
    state = get_peft_model_state_dict(chain)
    assert state.keys() == get_peft_model_state_dict(lora).keys()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(case.run(lora), case.run(chain), rtol=0, atol=1e-12)
    stir(lora, seed=8)
    set_peft_model_state_dict(chain, get_peft_model_state_dict(lora))
    torch.testing.assert_close(case.run(chain), case.run(lora), rtol=0, atol=1e-12)
    chain.save_pretrained(tmp_path / "chain")
    lora.save_pretrained(tmp_path / "lora")
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("chain", "lora")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][key]) for key, tensor in saved[0].items())
    loaded = PeftModel.from_pretrained(build(case).double(), tmp_path / "chain", adapter_name="other")
    assert any(type(module) is ChainLinear for module in loaded.modules())
    torch.testing.assert_close(case.run(loaded), case.run(chain), rtol=0, atol=1e-12)
    plain = fold_to_lora(chain)
    assert not any(type(module) is ChainLinear for module in plain.modules())
    torch.testing.assert_close(case.run(plain), case.run(chain), rtol=0, atol=1e-12)


def test_lora_by_name_stays_pefts() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), method_config("lora-2", ["0"]))
    assert type(model.base_model.model[0]).__module__ == "peft.tuners.lora.layer"
