"""Small models of the architectures that PEFT's LoRA adapts, and what the tests of the adapters do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)

_IDS = torch.tensor([[5, 7, 11, 13, 2], [3, 1, 4, 1, 5]])


class Mixture(nn.Module):
    """Every layer type outside transformers that LoRA adapts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding="valid")
        self.conv3 = nn.Conv3d(4, 2, (1, 2, 1))
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fan_in = Conv1D(6, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))  # (batch, 6, length)
        x = self.conv2(x[:, None])  # (batch, 4, 4, 2)
        x = self.conv3(x[:, :, None]).flatten(2).transpose(1, 2)  # (batch, 6, 2)
        x = torch.cat([x, x.flip(1)], dim=-1)
        return self.head(torch.tanh(self.fan_in(self.mha(x, x, x, need_weights=False)[0].contiguous()))).mean(1)


@dataclass(frozen=True)
class Case:
    """A model to adapt: how to build it, the layers to target, and its output for a fixed input."""

    build: Callable[[], nn.Module]
    targets: list[str]
    run: Callable[[nn.Module], Tensor]


def _logits(**inputs: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(**inputs).logits


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}

CASES = {
    "llama": Case(
        lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, intermediate_size=24, num_key_value_heads=1)),
        ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"],
        _logits(input_ids=_IDS),
    ),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)
        ),
        ["c_attn", "c_fc"],
        _logits(input_ids=_IDS),
    ),
    "opt": Case(
        lambda: OPTForCausalLM(
            OPTConfig(**_SMALL, word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=16, pad_token_id=0)
        ),
        ["q_proj", "fc1", "fc2"],
        _logits(input_ids=_IDS),
    ),
    "t5": Case(
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
        ),
        ["q", "v", "wo"],
        _logits(input_ids=_IDS, decoder_input_ids=_IDS),
    ),
    "roberta": Case(
        lambda: RobertaForSequenceClassification(
            RobertaConfig(**_SMALL, intermediate_size=24, max_position_embeddings=16)
        ),
        ["query", "value", "dense"],
        _logits(input_ids=_IDS),
    ),
    "vit": Case(
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=8,
                patch_size=4,
            )
        ),
        ["q_proj", "v_proj", "projection"],
        _logits(pixel_values=torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)),
    ),
    "mixture": Case(
        Mixture,
        ["embed", "conv1", "conv2", "conv3", "mha", "fan_in", "head"],
        lambda model: model(_IDS),
    ),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture
def build() -> Callable[[Case], nn.Module]:
    """Build a case's model, the same each time."""

    def _build(case: Case) -> nn.Module:
        torch.manual_seed(7)
        return case.build().eval()

    return _build


@pytest.fixture
def stir() -> Callable[[nn.Module], None]:
    """Give every factor of every adapter a random value, so that delta is not zero."""

    def _stir(model: nn.Module, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)

    return _stir


@pytest.fixture
def layers_of() -> Callable[[nn.Module], list[Any]]:
    """Adapted layers of a model in order."""
    return lambda model: [module for module in model.modules() if isinstance(module, LoraLayer)]
