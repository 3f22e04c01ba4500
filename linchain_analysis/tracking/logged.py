"""Scalars that a training loop says of its steps, until they can be written."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linchain_analysis.errors import InputError


class LoggedScalars:
    """Keeps them while there is no step for them yet, or while they are still computed on a device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, Any]] = []

    def add(self, step: int, name: str, value: Any) -> None:
        """Keep what `check_scalar` returned, said after `step`."""
        self._waiting.append((step, name, value))

    def take(self, running_step: int | None) -> list[tuple[int, str, float]]:
        """Return and forget those that are there: step (from 1), name and value.

        Args:
            running_step: Values on a device that were said after it may still be computed, and wait; None to wait for
                nothing.
        """
        now: list[tuple[int, str, Any]] = []
        later: list[tuple[int, str, Any]] = []
        for step, name, value in self._waiting:
            (later if _on_device(value) and step == running_step else now).append((step, name, value))
        self._waiting = later
        return [(max(step, 1), name, float(value)) for step, name, value in now]


def check_scalar(name: str, value: Any) -> Any:
    """Return `value` as a number, or detached where it is on a device, which nobody waits for here.

    Raises:
        InputError: A tensor of more than one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(name, expected="one number", got=f"a tensor of shape {tuple(value.shape)}", do="reduce it")
        value = value.detach()
        return value.clone() if _on_device(value) else float(value)
    return float(value)


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
