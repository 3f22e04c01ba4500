"""Models to measure on: random Llamas, a stack of adapted layers without anything around them, the built-in model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linchain_analysis.adapters import method_config
from linchain_analysis.problems import load_problem
from linchain_analysis.problems.models import PAPER_TARGETS
from linchain_analysis.training.batches import EncodedRecords, collate

VOCABULARY = 1000
METHOD = "linchain-3-16"
TARGETS = PAPER_TARGETS  # five layers of each block


def build_llama(hidden: int, num_layers: int, device: str = "cpu") -> Any:
    """Return a Llama of random weights with the proportions of the real ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,  # 1376 for 512, 11008 for 4096
        num_hidden_layers=num_layers,
        num_attention_heads=max(hidden // 64, 2),
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device)


def adapt(base: nn.Module, config: Any) -> Any:
    """Return an adapted copy of `base` that shares its weights, so that models to compare use the same memory."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(base, shared), config)


def adapt_by_method(base: nn.Module, method: str = METHOD) -> Any:
    """Return `base` with the adapters of a named method on its query, key, value, up and down projections."""
    return adapt(base, method_config(method, target_modules=TARGETS))


def draw_tokens(batch_size: int, num_tokens: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return one batch of random tokens, which are their own labels."""
    tokens = torch.randint(0, VOCABULARY, (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.to(device), "labels": tokens.to(device)}


class Stack(nn.Module):
    """Square linear layers that share one frozen weight: their adapters are what is measured, no input comes by.

    Args:
        num_modules: How many.
        hidden: Width of each.
    """

    def __init__(self, num_modules: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden, bias=False, device="meta") for _ in range(num_modules))
        weight = nn.Parameter(torch.zeros(hidden, hidden), requires_grad=False)
        for layer in self.layers:
            layer.weight = weight


def build_stack(num_modules: int, hidden: int, rank: int, device: str = "cpu") -> Any:
    """Return an adapted stack: LinChain with three inner factors of `rank`."""
    config = method_config(f"linchain-3-{rank}", target_modules=r".*layers\.\d+")
    return adapt(Stack(num_modules, hidden).to(device), config)


def build_builtin(device: str = "cpu") -> tuple[Any, dict[str, Tensor]]:
    """Return the built-in problem's model, adapted, and one of its batches."""
    problem = load_problem()
    tokenizer: Any = problem.load_tokenizer()
    records = EncodedRecords(problem, problem.train, tokenizer)
    examples = [records[index] for index in range(problem.defaults.batch_size)]
    batch = collate(examples, pad_token_id=int(tokenizer.pad_token_id))
    config = method_config(METHOD, target_modules=list(problem.target_modules))
    model = adapt(problem.load_model().to(device), config)
    return model, {name: tensor.to(device) for name, tensor in batch.items()}
