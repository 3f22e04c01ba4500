"""The tables of one run or of many as pandas frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import pandas as pd

FRAMES = ("steps", "modules", "factors", "links", "evals")
READABLE = (*FRAMES, "snapshots", "health")


class Frames(ABC):
    """Frames that are read when they are first used, and kept."""

    @abstractmethod
    def read(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read `columns` of `table`, all of them by default."""

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per optimiser step, with what `log` added."""
        return self.read("steps")

    @cached_property
    def modules(self) -> pd.DataFrame:
        """One row per recorded step and adapted layer."""
        return self.read("modules")

    @cached_property
    def factors(self) -> pd.DataFrame:
        """One row per recorded step, adapted layer and factor."""
        return self.read("factors")

    @cached_property
    def links(self) -> pd.DataFrame:
        """One row per recorded step, adapted layer and pair of neighbouring factors."""
        return self.read("links")

    @cached_property
    def evals(self) -> pd.DataFrame:
        """One row per evaluation, split and metric."""
        return self.read("evals")

    @cached_property
    def health(self) -> pd.DataFrame:
        """One row per finding on the health of the training that began or ended."""
        return self.read("health")
