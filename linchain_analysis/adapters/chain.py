"""The modules that hold the factors of a chain. Everything is stored like `nn.Linear`, (out, in)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_autocast(device: str) -> bool:
    """Tell whether autocast is on for a type of device; some, as `meta`, do not know it."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Return a context in which operations keep the dtype of their operands."""
    # Entering torch's own takes longer than multiplying two inner factors.
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


class InnerFactors(nn.Module):
    """W1 … Wn of one chain, each (w_i, w_{i-1}), with w_0 = w_n = r.

    The factors are direct attributes, because PEFT removes an adapter's name only from there when it saves: inside a
    `ParameterList` they would be left at their initial values when loaded under another name.

    Attributes:
        factor_names: Names of the parameters held here, from input to output.
    """

    factor_names: tuple[str, ...]

    def __init__(self, inner: Sequence[Tensor], requires_grad: bool = True) -> None:
        super().__init__()
        self.factor_names = ()
        for index, factor in enumerate(inner, start=1):
            self._hold(f"W{index}", factor, requires_grad)

    def _hold(self, name: str, factor: Tensor, requires_grad: bool) -> None:
        self.register_parameter(name, nn.Parameter(factor, requires_grad=requires_grad))
        self.factor_names = (*self.factor_names, name)

    def chain_factors(self) -> list[tuple[str, nn.Parameter, bool]]:
        """Return (name, parameter, transposed) from input to output.

        `transposed` says that the chain view of a factor, (d_in, r) or (w_{i-1}, w_i), is the transpose of the stored
        parameter, whose axes after the first count as one.
        """
        return [(name, getattr(self, name), True) for name in self.factor_names]

    def inner_factors(self) -> list[nn.Parameter]:
        """Return W1 … Wn."""
        return [getattr(self, name) for name in self.factor_names if name != "A"]

    def inner_product(self, scale: float = 1.0) -> Tensor:
        """Return scale · Wn … W1, shape (r, r): the small matrix that the whole depth of the chain comes down to.

        Formed in the factors' own dtype also under autocast, which would round every intermediate product.
        """
        first, *others = self.inner_factors()
        with without_autocast(first.device.type):
            product: Tensor = first
            for factor in others:
                product = factor @ product
            return product if scale == 1.0 else product * scale

    def extra_repr(self) -> str:
        """Show the widths of the chain."""
        return ", ".join(f"{name}: {tuple(getattr(self, name).shape)}" for name in self.factor_names)


class FactorChain(InnerFactors):
    """A, W1 … Wn in the place of LoRA's A: a linear map from d_in to r that answers `.weight` with its product.

    Merging, deltas, conversion and the quantised layers of PEFT read that product and need nothing else.

    Args:
        first: A, (r, d_in), or (r, channels, *kernel) of a convolution.
        inner: W1 … Wn.
        requires_grad: Whether the factors train.
    """

    A: nn.Parameter

    def __init__(self, first: Tensor, inner: Sequence[Tensor], requires_grad: bool = True) -> None:
        super().__init__((), requires_grad)
        self._hold("A", first, requires_grad)
        for index, factor in enumerate(inner, start=1):
            self._hold(f"W{index}", factor, requires_grad)

    @property
    def weight(self) -> Tensor:
        """Product Wn … W1 A in the shape of A. It is formed at each reading: writing into it changes nothing."""
        return self.fold_first(self.inner_product())

    @property
    def bias(self) -> None:
        """A chain has no bias."""
        return

    def fold_first(self, product: Tensor) -> Tensor:
        """Return `product` (r, r) times A, in the shape of A."""
        first: Tensor = self.A
        with without_autocast(first.device.type):
            return (product @ first.flatten(1)).view(first.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, d_in) to (…, r)."""
        return F.linear(x, self.weight)


class ConvFactorChain(FactorChain):
    """The chain in the place of the convolution that LoRA uses as A; the inner factors act on its r channels.

    Args:
        convolution: The module that PEFT made for A, without bias, zero-padded, undilated and in one group.
        inner: W1 … Wn.
    """

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, inner: Sequence[Tensor]) -> None:
        super().__init__(convolution.weight.data, inner, convolution.weight.requires_grad)
        self.stride = convolution.stride
        self.padding = convolution.padding
        self.convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[convolution.weight.dim()]

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, *space) to (batch, r, *space after stride and padding)."""
        result: Tensor = self.convolve(x, self.weight, stride=self.stride, padding=self.padding)
        return result
