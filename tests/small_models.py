"""Models small enough to train in a test, of the architectures that people fine-tune."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
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

VOCABULARY = 48


def llama(**changes: Any) -> nn.Module:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    )


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    )


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=66,
            pad_token_id=1,
        )
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )


BUILDERS = {"llama": llama, "gpt2": gpt2, "opt": opt, "t5": t5, "roberta": roberta, "vit": vit}

# What users adapt in each: attention and feed-forward layers, written as a suffix or a pattern.
TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "t5": ["q", "v", "wo"],
    "roberta": ["query", "value", "intermediate.dense"],
    "vit": r".*(q_proj|v_proj|query|value|fc1|fc2|mlp.*dense)$",
}


def batch(name: str, seed: int = 0, size: int = 4, length: int = 10) -> dict[str, torch.Tensor]:
    """Inputs and labels that the model called `name` takes a loss of."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {
            "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
            "labels": torch.randint(0, 2, (size,), generator=generator),
        }
    tokens = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    labels = torch.randint(0, 2, (size,), generator=generator) if name == "roberta" else tokens
    return {"input_ids": tokens, "labels": labels}
