"""What the control of the edge of stability trains: tanh networks on a polynomial, as functions of one flat vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from linchain_analysis.adapters import method_config

NUM_POINTS = 20
DEGREE = 4

Loss = Callable[[Tensor], Tensor]


def draw_network(seed: int, num_hidden: int = 1, width: int = 100, bias: float = 0.0) -> nn.Sequential:
    """Return a tanh network from one number to one, float64, with the initial gain 1.9 of the source's code.

    Args:
        seed: Of its weights.
        num_hidden: Hidden layers.
        width: Units of each.
        bias: Standard deviation of the initial biases. Where they stay as they are they must not be 0: without them the
            network is an odd function, and the polynomial an even one.
    """
    sizes = [1, *[width] * num_hidden, 1]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(len(sizes) - 1):
            last = i == len(sizes) - 2
            layer = nn.Linear(sizes[i], sizes[i + 1], bias=not last, dtype=torch.float64)
            nn.init.xavier_normal_(layer.weight, gain=1.0 if last else 1.9)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=bias)
            layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


def adapt_network(network: nn.Sequential, method: str, seed: int) -> Any:
    """Return `network`, frozen, with an adapter of the named method on its first layer between hidden units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(network, method_config(method, target_modules=["2"])).double()


def flatten(model: nn.Module) -> tuple[Loss, Tensor]:
    """Return the full-batch loss, ½ mean square error, of the trained parameters as one vector, and that vector now."""
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    frozen = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    sizes = [value.numel() for value in trained.values()]
    points = np.linspace(-1, 1, NUM_POINTS)
    inputs = torch.from_numpy(points[:, None])
    targets = torch.from_numpy(np.polynomial.Chebyshev.basis(DEGREE)(points)[:, None])

    def loss(vector: Tensor) -> Tensor:
        parts = zip(trained.items(), torch.split(vector, sizes), strict=True)
        values = {name: part.view(value.shape) for (name, value), part in parts}
        outputs: Tensor = functional_call(model, (values, frozen), (inputs,))
        return 0.5 * (outputs - targets).square().mean()

    return loss, torch.cat([value.flatten() for value in trained.values()])
