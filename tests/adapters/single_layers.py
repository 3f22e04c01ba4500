"""One adapted linear layer, its twin that applies the factors one by one, and how the two are compared."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from linchain_analysis.adapters import LinChainConfig, read_factors
from linchain_analysis.adapters.fused import FusedLinear
from linchain_analysis.adapters.layer import ChainLinear


def adapted(
    d_in: int, d_out: int, dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any
) -> ChainLinear:
    """Return one adapted layer whose factors are all drawn, B too."""
    torch.manual_seed(0)
    config = LinChainConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False, **options})
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    return get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]


def one_by_one(layer: ChainLinear, x: Tensor) -> Tensor:
    """x W + bias + scale · x A W1 … Wn B, one factor at a time."""
    hidden = layer.lora_dropout["default"](x)
    for _, factor, _ in read_factors(layer, "default"):
        hidden = hidden @ factor.t()
    return layer.base_layer(x) + layer.scaling["default"] * hidden


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def is_fused(output: Tensor) -> bool:
    return isinstance(output.grad_fn, FusedLinear._backward_cls)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def close(got: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def gradients(output: Tensor, x: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), [x, *trained(layer)])
