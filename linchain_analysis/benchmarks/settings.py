"""How thoroughly, on what and where a benchmark is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
QUICK_PAIRS = 2


@dataclass(frozen=True)
class Settings:
    """What every topic is told.

    Attributes:
        folder: Scratch folder; whatever a topic writes goes below it.
        quick: Small sizes and few pairs, to see that everything works; what it prints says nothing about cost.
        num_pairs: Pairs of every comparison; each topic's own number if unset.
        device: Where models and tensors are, `cpu` or `cuda`.
    """

    folder: Path
    quick: bool = False
    num_pairs: int | None = None
    device: str = "cpu"

    def pairs(self, usual: int) -> int:
        """Return how many pairs a comparison takes that is usually made of `usual` ones."""
        return self.num_pairs or (QUICK_PAIRS if self.quick else usual)

    def size(self, usual: T, quick: T) -> T:
        """Return the size of a subject."""
        return quick if self.quick else usual

    def sizes(self, usual: Sequence[T], quick: Sequence[T]) -> Sequence[T]:
        """Return the sizes of a series of subjects."""
        return quick if self.quick else usual

    @property
    def clock(self) -> str:
        """Clock that judges: CPU time of the process, or on an accelerator, which the CPU only waits for, wall time."""
        return "cpu" if self.device == "cpu" else "wall"
