"""A grid of chains on synthetic maps: methods × learning rates × seeds that share every other setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from linchain_analysis.errors import InputError
from linchain_analysis.method_names import FORMS, NamedMethod, parse_method
from linchain_analysis.problems.synthetic import MapSetting
from linchain_analysis.problems.synthetic.checking import require_number, require_whole
from linchain_analysis.tracking.presets import select
from linchain_analysis.training.grid import check_axes, name_run
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

DEFAULT_METHODS = ("lora-8", "moslora-8", "linchain-2-8-w8", "linchain-3-8", "linchain-4-8")
# Octaves; from too small to learn anything in 800 steps to too large to learn at all, at the default setting.
ADAM_RATES = tuple(2.0**k for k in range(-14, 0))
GD_RATES = tuple(2.0**k for k in range(-7, 5))
QUARTIC_GD_RATES = tuple(2.0**k for k in range(-3, 9))  # gradients are the cubes of errors, most of them below 1
_FACTORS = ("A", "W", "B")


@dataclass(frozen=True)
class MapRunSettings:
    """Everything that decides the numbers of one run, and what is recorded of it.

    Attributes:
        method: Name of the method.
        problem: What is learned.
        learning_rate: Of every factor, unless `factor_rates` says more.
        init_seed: Seed of the initial factors.
        data_seed: Seed of the map, its inputs and their noise.
        optimizer: How.
        num_steps: Number of steps.
        scale: What multiplies the product of the factors; None for alpha / r = 2.
        first_gain: What multiplies A as it starts.
        inner_gain: What multiplies every inner factor as it starts.
        freeze_inner: Whether the inner factors stay as they start.
        factor_rates: What multiplies the learning rate, by `A`, `W` (all inner factors) and `B`; 1 where it is not
            said. `{"B": 16}` is LoRA+ (Hayou et al. 2024).
        preset: What is recorded: `light`, `standard` or `full`.
        measures: Names of further measures.
        every: At which steps: a number n for n, 2 n, …; `auto` for all at first and fewer later.
    """

    method: str
    problem: MapSetting
    learning_rate: float
    init_seed: int
    data_seed: int
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    num_steps: int = 800
    scale: float | None = 1.0
    first_gain: float = 1.0
    inner_gain: float = 1.0
    freeze_inner: bool = False
    factor_rates: Mapping[str, float] | None = None
    preset: str = "standard"
    measures: tuple[str, ...] = ()
    every: int | str = "auto"

    def __post_init__(self) -> None:
        if self.method == "full-finetune":
            raise InputError(
                "method",
                expected=f"a chain ({FORMS})",
                got="'full-finetune', but a map has no weights of its own to train",
                do="leave it out; a chain of r = min(d_in, d_out) can become any map",
            )
        parse_method(self.method)
        require_number("learning_rate", self.learning_rate, above=0.0)
        for name in ("init_seed", "data_seed"):
            require_whole(name, getattr(self, name), least=0)
        require_whole("num_steps", self.num_steps, least=1)
        if self.scale is not None:
            require_number("scale", self.scale, above=0.0)
        for name in ("first_gain", "inner_gain"):
            require_number(name, getattr(self, name))
        for name, rate in (self.factor_rates or {}).items():
            if name not in _FACTORS:
                raise InputError(
                    "factor_rates", expected="keys A, W or B", got=repr(name), do="name factors by one of these"
                )
            require_number(f"factor_rates[{name!r}]", rate)
        select(self.preset, self.measures or None)
        if self.every != "auto":
            if isinstance(self.every, str):
                raise InputError(
                    "every", expected='a number ≥ 1 or "auto"', got=repr(self.every), do="pass one of these"
                )
            require_whole("every", self.every, least=1)

    @property
    def chain(self) -> NamedMethod:
        """What the name of the method says."""
        return parse_method(self.method)

    @property
    def scaling(self) -> float:
        """What multiplies the product of the factors."""
        return 2.0 if self.scale is None else float(self.scale)

    @property
    def trained(self) -> list[bool]:
        """Which of A, W1, …, Wn, B train."""
        return [True, *[not self.freeze_inner] * self.chain.chain_length, True]

    @property
    def rate_factors(self) -> list[float]:
        """What multiplies the learning rate of A, W1, …, Wn, B."""
        first, inner, last = (float((self.factor_rates or {}).get(name, 1.0)) for name in _FACTORS)
        return [first, *[inner] * self.chain.chain_length, last]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a flat JSON object, those of problem and optimiser beside the rest."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("problem", "optimizer")}
        problem = {"problem" if name == "name" else name: value for name, value in asdict(self.problem).items()}
        optimizer = {"optimizer" if name == "name" else name: v for name, v in asdict(self.optimizer).items()}
        content = {**own, "factor_rates": dict(self.factor_rates or {}) or None, **problem, **optimizer}
        found: dict[str, Any] = json.loads(json.dumps(content))  # tuples as lists, as they are read back
        return found

    def label_problem(self) -> str:
        """Return a short name of what is learned and how that says whatever is not as by default.

        Runs whose numbers cannot be compared as replicates have different ones. What a run varies on purpose, such as
        the method or the seed, is no part of it.
        """
        return "-".join([self.problem.name, *_label_map(self.problem), *self._label_training()])

    def _label_training(self) -> list[str]:
        parts: list[str] = []
        standard = OptimizerSettings()
        if self.optimizer.name != standard.name:
            parts.append(self.optimizer.name)
        for f in fields(OptimizerSettings):
            value = getattr(self.optimizer, f.name)
            if f.name != "name" and value != getattr(standard, f.name):
                parts.append(f"{f.name.replace('_', '')}{_tell(value)}")
        for name, label, usual in (
            ("scaling", "scale", 1.0),
            ("first_gain", "first", 1.0),
            ("inner_gain", "inner", 1.0),
            ("num_steps", "steps", 800),
        ):
            value = getattr(self, name)
            if value != usual:
                parts.append(f"{label}{_tell(value)}")
        if self.freeze_inner:
            parts.append("frozen")
        parts += [f"rate{name}{_tell(rate)}" for name, rate in (self.factor_rates or {}).items() if rate != 1]
        return parts


def _label_map(setting: MapSetting) -> list[str]:
    usual = MapSetting()
    parts = []
    if setting.dim != usual.dim or setting.shape[1] != setting.dim:
        parts.append(f"d{setting.dim}" + (f"x{setting.shape[1]}" if setting.shape[1] != setting.dim else ""))
    if setting.spectrum is not None:
        parts.append("sigma" + "_".join(_tell(value) for value in setting.spectrum))
    elif min(setting.target_rank, *setting.shape) != min(usual.target_rank, *setting.shape):
        parts.append(f"rank{setting.target_rank}")
    for name, label in (
        ("input_decay", "decay"),
        ("num_samples", "n"),
        ("batch_size", "batch"),
        ("label_noise", "noise"),
        ("observed", "observed"),
    ):
        value = getattr(setting, name)
        if value != getattr(usual, name):
            parts.append(f"{label}{_tell(value)}")
    if setting.loss != usual.loss:
        parts.append(setting.loss)
    return parts


def _tell(value: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(int(value)) if float(value).is_integer() and abs(value) < 1e6 else repr(float(value))


def default_methods(setting: MapSetting) -> tuple[str, ...]:
    """Return `DEFAULT_METHODS` with r = min(8, d_in, d_out): no map has a larger rank."""
    rank = min(8, *setting.shape)
    if rank == 8:
        return DEFAULT_METHODS
    return f"lora-{rank}", f"moslora-{rank}", *(f"linchain-{length}-{rank}" for length in (2, 3, 4))


def default_rates(setting: MapSetting, optimizer: OptimizerSettings) -> tuple[float, ...]:
    """Return the learning rates of a grid that names none."""
    if optimizer.name not in ("gd", "momentum"):
        return ADAM_RATES
    return GD_RATES if setting.loss == "quadratic" else QUARTIC_GD_RATES


@dataclass(frozen=True)
class PlannedMapRun:
    """One cell of a grid: the name of its run folder and the settings of its run."""

    name: str
    settings: MapRunSettings


@dataclass(frozen=True)
class MapGrid:
    """Methods × learning rates × seeds on one synthetic map.

    Seed k is the seed of the initial factors and that of the map. All methods of one seed and rank start from the same
    A, and chains of one init from the same W1, W2, …, so that they are compared as pairs.

    Attributes:
        problem: What is learned; a name stands for its default setting.
        methods: Names of the methods; `DEFAULT_METHODS` stands for `default_methods(problem)`.
        learning_rates: Empty for `default_rates(problem, optimizer)`.
        seeds: Seeds, the units of replication.
        optimizer: As the rest, in `MapRunSettings`.
        num_steps: Number of steps.
        scale: What multiplies the product of the factors; None for alpha / r = 2.
        preset: What is recorded.
        measures: Names of further measures.
        every: At which steps.
        first_gain: What multiplies A as it starts.
        inner_gain: What multiplies every inner factor as it starts.
        freeze_inner: Whether the inner factors stay as they start.
        factor_rates: What multiplies the learning rate, by `A`, `W` and `B`.
    """

    problem: MapSetting | str
    methods: Sequence[str] = DEFAULT_METHODS
    learning_rates: Sequence[float] = ()
    seeds: Sequence[int] = range(10)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    num_steps: int = 800
    scale: float | None = 1.0
    preset: str = "standard"
    measures: Sequence[str] = ()
    every: int | str = "auto"
    first_gain: float = 1.0
    inner_gain: float = 1.0
    freeze_inner: bool = False
    factor_rates: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.problem, MapSetting):
            object.__setattr__(self, "problem", MapSetting(self.problem))
        assert isinstance(self.problem, MapSetting)
        if self.methods is DEFAULT_METHODS:
            object.__setattr__(self, "methods", default_methods(self.problem))
        for seed in self.seeds:
            require_whole("seeds", seed, least=0)
        for rate in self.learning_rates:
            require_number("learning_rates", rate, above=0.0)
        check_axes({"methods": self.methods, "seeds": self.seeds, "learning_rates": self.learning_rates})
        self.runs()  # every run's settings are checked before anything is started

    def runs(self) -> tuple[PlannedMapRun, ...]:
        """Return the runs, seeds outermost, so that a sweep that was cut short has compared methods already."""
        assert isinstance(self.problem, MapSetting)
        default = default_rates(self.problem, self.optimizer)
        shared: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("methods", "learning_rates", "seeds", "measures")
        }
        return tuple(
            PlannedMapRun(
                name_run(method, rate, seed),
                MapRunSettings(
                    method=method,
                    learning_rate=float(rate),
                    init_seed=int(seed),
                    data_seed=int(seed),
                    measures=tuple(self.measures),
                    **shared,
                ),
            )
            for seed in self.seeds
            for rate in tuple(self.learning_rates) or default
            for method in self.methods
        )

    def to_json(self) -> dict[str, Any]:
        """Return the grid as a JSON object."""
        varied = ("method", "learning_rate", "init_seed", "data_seed")
        first = self.runs()[0].settings.to_json()
        return {
            "methods": list(self.methods),
            "learning_rates": [float(rate) for rate in self.learning_rates],
            "seeds": [int(seed) for seed in self.seeds],
            "shared": {name: value for name, value in first.items() if name not in varied},
        }
