"""A grid of fine-tunes: methods × learning rates × seeds that share every other setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from linchain_analysis.errors import InputError
from linchain_analysis.training.settings import FinetuneSettings

_OWN = ("method", "learning_rate", "init_seed", "data_seed")  # what the grid itself varies

DEMO_METHODS = ("lora-16", "moslora-16", "linchain-3-16", "linchain-2-8")


@dataclass(frozen=True)
class PlannedRun:
    """One cell of a grid: the name of its run folder and the settings of its run."""

    name: str
    settings: FinetuneSettings


@dataclass(frozen=True)
class Grid:
    """Methods × learning rates × seeds.

    Seed k is both the seed of initialisation and that of the data, so runs of different methods with the same seed
    see the same records in the same order and are compared as pairs.

    Attributes:
        methods: Names of the methods.
        seeds: Seeds, the units of replication.
        learning_rates: Peak learning rates; empty for the problem's own.
        shared: The other settings, as keywords of `FinetuneSettings`, the same for every run.
    """

    methods: Sequence[str]
    seeds: Sequence[int] = (0,)
    learning_rates: Sequence[float] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_axes({"methods": self.methods, "seeds": self.seeds, "learning_rates": self.learning_rates})
        own = sorted(set(self.shared) & set(_OWN))
        if own:
            raise InputError(
                "shared",
                expected="settings that the grid does not vary",
                got=", ".join(own),
                do="give them to the grid",
            )
        # Every run's settings are checked here, before anything is started.
        for method in self.methods:
            for rate in self.learning_rates or (None,):
                for seed in self.seeds:
                    self._settings(method, rate, seed)

    def _settings(self, method: str, learning_rate: float | None, seed: int) -> FinetuneSettings:
        own = {"method": method, "learning_rate": learning_rate, "init_seed": seed, "data_seed": seed}
        return FinetuneSettings.from_json({**self.shared, **own})

    @property
    def first_settings(self) -> FinetuneSettings:
        """Settings of the grid's first run, which name the problem, the model and the data of all."""
        return self._settings(self.methods[0], next(iter(self.learning_rates), None), self.seeds[0])

    def runs(self, default_learning_rate: float) -> tuple[PlannedRun, ...]:
        """Return the runs, seeds outermost, so that a sweep that was cut short has compared methods already."""
        rates = tuple(self.learning_rates) or (default_learning_rate,)
        return tuple(
            PlannedRun(name_run(method, rate, seed), self._settings(method, rate, seed))
            for seed in self.seeds
            for rate in rates
            for method in self.methods
        )

    def to_json(self) -> dict[str, Any]:
        """Return the grid as a JSON object."""
        return {
            "methods": list(self.methods),
            "learning_rates": list(self.learning_rates),
            "seeds": list(self.seeds),
            "shared": dict(self.shared),
        }


def check_axes(axes: Mapping[str, object]) -> None:
    """Refuse what a grid cannot be made of.

    Args:
        axes: What it varies, by name; only `learning_rates` may be empty.

    Raises:
        InputError: An axis that is no list, is empty or names something twice.
    """
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InputError(name, expected="a list", got=repr(values), do="put it in a list")
        if name != "learning_rates" and not values:
            raise InputError(name, expected="at least one", got="none", do="name one")
        twice = sorted(str(value) for value, count in Counter(values).items() if count > 1)
        if twice:
            raise InputError(name, expected="each once", got=f"{', '.join(twice)} twice", do="leave one out")


def name_run(method: str, learning_rate: float, seed: int) -> str:
    """Return the name of a run's folder; different cells of a grid have different names."""
    # repr is the shortest text that reads back as the same number.
    return f"{method}_lr{float(learning_rate)!r}_seed{seed}"
