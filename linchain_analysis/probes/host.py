"""One transfer from the device to the host, whatever was asked for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """Collects tensors of a device and brings them to the host together."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []

    def add(self, tensor: Tensor) -> int:
        """Queue `tensor` and return its number in what `fetch` will return."""
        self._parts.append(readable(tensor.detach()).to(torch.float64).reshape(-1))
        self._shapes.append(tuple(tensor.shape))
        return len(self._parts) - 1

    def fetch(self) -> list[NDArray[np.float64]]:
        """Return every queued tensor as a float64 array of its shape, by number."""
        if not self._parts:
            return []
        device = self._parts[0].device
        flat = torch.cat([part.to(device) for part in self._parts]).cpu().numpy()
        ends = np.cumsum([int(np.prod(shape, dtype=np.int64)) for shape in self._shapes])
        parts = np.split(flat, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def readable(tensor: Tensor) -> Tensor:
    """Return `tensor` where float64 arithmetic is possible: on the host if its device has none (MPS)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
