"""Methods by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from linchain_analysis.adapters import LinChainConfig, method_config
from linchain_analysis.errors import InputError

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "rank", "widths", "init"),
    [
        ("moslora-16", 16, (16, 16), "kaiming"),
        ("moslora-4-orthogonal", 4, (4, 4), "orthogonal"),
        ("linchain-3-16", 16, (16, 16, 16, 16), "kaiming"),
        ("linchain-2-8", 8, (8, 16, 8), "kaiming"),
        ("linchain-2-8-lecun", 8, (8, 16, 8), "lecun"),
        ("linchain-2-8-w8", 8, (8, 8, 8), "kaiming"),
        ("linchain-2-16", 16, (16, 16, 16), "kaiming"),
        ("linchain-3-8", 8, (8, 8, 8, 8), "kaiming"),
        ("linchain-0-8", 8, (8,), "kaiming"),
        ("linchain-2-4-w32-identity", 4, (4, 32, 4), "identity"),
    ],
)
def test_names(name: str, rank: int, widths: tuple[int, ...], init: str) -> None:
    config = method_config(name, target_modules=TARGETS)
    assert isinstance(config, LinChainConfig)
    assert (config.r, config.lora_alpha, config.widths(config.r), config.chain_init) == (rank, 2 * rank, widths, init)
    assert config.target_modules == set(TARGETS)


def test_lora_is_pefts_own() -> None:
    config = method_config("lora-16", TARGETS)
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha) == (16, 32)


def test_overrides_win() -> None:
    config = method_config("linchain-3-16", TARGETS, lora_alpha=5, lora_dropout=0.1, chain_init="he")
    assert (config.lora_alpha, config.lora_dropout, config.chain_init) == (5, 0.1, "he")
    assert method_config("lora-8", "all-linear", use_rslora=True).use_rslora


@pytest.mark.parametrize(
    "name",
    ["lora", "lora-0", "lora-16-he", "LoRA-16", "linchain-3", "linchain-3-16-w0", "linchain-3-16-xx", "", None, 3],
)
def test_unknown_names(name: object) -> None:
    with pytest.raises(InputError) as caught:
        method_config(name, TARGETS)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)
    assert "linchain-N-R[-wWIDTH][-INIT]" in str(caught.value)


def test_full_finetune_has_no_adapter() -> None:
    with pytest.raises(InputError, match="'full-finetune', which trains the model's own weights"):
        method_config("full-finetune", TARGETS)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora-16", 28_311_552), ("moslora-16", 28_352_512), ("linchain-3-16", 28_434_432), ("linchain-2-8", 14_196_736)],
)
def test_trainable_parameters_of_llama_3_8b(name: str, count: int) -> None:
    shapes = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes)
    adapted = get_peft_model(model, method_config(name, TARGETS))
    assert adapted.get_nb_trainable_parameters()[0] == count
