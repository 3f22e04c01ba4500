"""One transfer from the device to the host, whatever was asked for, and memory that is used over and over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """Places for results on their device, brought to the host together, as float64."""

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._lent: list[Tensor] = []
        self._arrays: dict[int, NDArray[np.float64]] = {}  # by the identity of a place or of what was lent

    def reserve(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return a place for a result, not initialised, to be written before every transfer."""
        place = torch.empty(shape, dtype=torch.float64, device=device)
        self._places.append(place)
        return place

    def lend(self, tensor: Tensor) -> Tensor:
        """Let the next transfer, and no later one, take `tensor` along as it stands then."""
        self._lent.append(tensor)
        return tensor

    def fetch(self, extra: Sequence[Tensor] = ()) -> list[float]:
        """Bring what stands in every place to the host, and the one-element tensors of `extra`, in one transfer.

        Returns:
            The numbers in `extra`.
        """
        wanted = [*self._places, *self._lent]
        if all(part.device.type == "cpu" for part in (*wanted, *extra)):
            # Nothing to transfer: places are read where they stand, until they are written again.
            self._arrays = {id(part): part.to(torch.float64).numpy() for part in wanted}
            return [float(tensor) for tensor in extra]
        scalars = [readable(tensor.detach()).to(torch.float64).reshape(1) for tensor in extra]
        parts = [*(part.to(torch.float64).view(-1) for part in wanted), *scalars]
        if not parts:
            return []
        device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
        if any(part.device != device for part in parts):
            parts = [part.to(device, non_blocking=True) for part in parts]
        flat = torch.cat(parts).cpu().numpy()
        start = 0
        for part in wanted:
            end = start + part.numel()
            self._arrays[id(part)] = flat[start:end].reshape(part.shape)
            start = end
        numbers: list[float] = flat[start:].tolist()
        return numbers

    def fetched(self, place: Tensor) -> NDArray[np.float64]:
        """Return what stood in `place` at the last transfer; to be used before the place is written again."""
        return self._arrays[id(place)]

    def release(self) -> None:
        """Forget what the last transfer brought, and what was lent to it."""
        self._arrays, self._lent = {}, []


class Scratch:
    """Memory for intermediate results by name: everybody who takes a name writes over what the last one left there."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of `shape` that holds anything."""
        size = int(np.prod(shape, dtype=np.int64))
        kept = self._kept.get((name, dtype, device))
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=dtype, device=device)
            self._kept[name, dtype, device] = kept
        return kept[:size].view(shape)


def readable(tensor: Tensor) -> Tensor:
    """Return `tensor` where float64 arithmetic is possible: on the host if its device has none (MPS)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
