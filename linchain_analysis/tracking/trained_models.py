"""Find, among all that is alive, the model whose adapters an optimiser trains."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def model_of(optimizer: Optimizer) -> nn.Module | None:
    """Return the outermost module that holds the adapted layers whose adapters `optimizer` trains.

    Where it trains those of several, they are returned as one list of modules.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a script without PEFT need not wait for its import
    if tuners is None:
        return None
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = list(_alive(nn.Module))
    layers = {
        id(module)
        for module in modules
        if issubclass(type(module), tuners.BaseTunerLayer) and any(id(p) in optimized for p in _adapter_of(module))
    }
    if not layers:
        return None
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    outermost = [module for module in modules if id(module) not in inner]
    found = _cover(outermost, layers)
    if layers:  # of modules that hold each other, where none is outermost, any that holds the most will do
        found += _cover(modules, layers)
    return found[0] if len(found) == 1 else nn.ModuleList(found)


def _cover(roots: Sequence[nn.Module], layers: set[int]) -> list[nn.Module]:
    """Take as few of `roots` as hold all `layers` that they hold, and take these out of `layers`."""
    held = [(root, {id(module) for module in root.modules()} & layers) for root in roots]
    chosen: list[nn.Module] = []
    for root, its_layers in sorted(held, key=lambda pair: -len(pair[1])):
        if its_layers & layers:
            chosen.append(root)
            layers -= its_layers
    return chosen


def _adapter_of(layer: Any) -> Iterable[Tensor]:
    """Yield the parameters of the adapters on a layer, not those of the layer under them."""
    for name in dict.fromkeys(layer.adapter_layer_names):
        held = getattr(layer, name, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
            yield from held.parameters()


def _alive(kind: type) -> Iterable[Any]:
    # By type, not isinstance: asking some lazy objects for their class makes them do things.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]
