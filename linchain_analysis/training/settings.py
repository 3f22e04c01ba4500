"""What one fine-tune is made of, as data: validated when made, written to and read from JSON."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol, get_args

from linchain_analysis.errors import InputError

Schedule = Literal["linear", "cosine", "constant"]
Preset = Literal["light", "standard", "full"]

_LARGEST_SEED = 2**32 - 1  # NumPy's global stream takes no larger one, and `transformers.set_seed` sets it too


class Defaults(Protocol):
    """What a problem knows about how it is best trained."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    @property
    def num_steps(self) -> int: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides the numbers of one run. None means: as the problem has it by default.

    Attributes:
        method: Name of the method, `linchain-3-16` for example (see `method_config`).
        problem: Name of a built-in problem; `sums` where there is no `data` either.
        model: Folder or hub name of another base model.
        data: JSON file of records (`instruction`, `input`, `output`, `answer`).
        template: Layout of the prompts.
        num_eval: Number of held-out records.
        learning_rate: Peak learning rate of AdamW.
        schedule: How the learning rate goes on from its peak, to 0 at the last step unless constant.
        num_warmup_steps: Steps over which it rises to its peak.
        num_steps: Optimiser steps.
        epochs: Passes over the training records, in place of `num_steps`.
        batch_size: Records in one forward pass.
        accumulation: Forward passes in one optimiser step.
        max_grad_norm: Norm to which gradients are clipped; 0 for no clipping.
        dropout: Dropout in front of the adapters' first factor.
        bf16: Base weights and autocast in bfloat16; the adapters stay in float32.
        init_seed: Seed of the adapters' initial factors.
        data_seed: Seed of what comes with the data: the order of the records and the dropout masks.
        preset: What the tracker records.
        every: Record every so many steps; "auto" keeps the log under its budget.
        save_adapter: Leave the trained adapter in the run folder, as `adapter/`.
    """

    method: str
    problem: str | None = None
    model: str | None = None
    data: str | None = None
    template: str | None = None
    num_eval: int | None = None
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    num_warmup_steps: int = 0
    num_steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    accumulation: int = 1
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    bf16: bool = False
    init_seed: int = 0
    data_seed: int = 0
    preset: Preset = "standard"
    every: int | Literal["auto"] = "auto"
    save_adapter: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise InputError("method", expected="a name", got=repr(self.method), do="name one")
        if self.problem is not None and self.data is not None:
            raise InputError(
                "problem",
                expected="either a built-in problem or data",
                got=f"{self.problem} and {self.data}",
                do="give one of them",
            )
        for name in ("num_eval", "num_steps", "batch_size"):
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name), least=1)
        _require_whole("accumulation", self.accumulation, least=1)
        _require_whole("num_warmup_steps", self.num_warmup_steps, least=0)
        for name in ("init_seed", "data_seed"):
            _require_whole(name, getattr(self, name), least=0, most=_LARGEST_SEED)
        if self.every != "auto":
            _require_whole("every", self.every, least=1)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and value > 0):
                raise InputError(name, expected="a number above 0", got=repr(value), do="give a positive one")
        if not (_is_finite(self.max_grad_norm) and self.max_grad_norm >= 0):
            raise InputError(
                "max_grad_norm",
                expected="a number of at least 0",
                got=repr(self.max_grad_norm),
                do="give 0 for no clipping",
            )
        if not (_is_finite(self.dropout) and 0 <= self.dropout < 1):
            raise InputError("dropout", expected="a number in [0, 1)", got=repr(self.dropout), do="give 0 for none")
        _require_choice("schedule", self.schedule, get_args(Schedule))
        _require_choice("preset", self.preset, get_args(Preset))
        if self.num_steps is not None and self.epochs is not None:
            raise InputError(
                "num_steps",
                expected="either steps or epochs",
                got=f"{self.num_steps} and {self.epochs}",
                do="give one of them",
            )

    def resolve(self, defaults: Defaults) -> FinetuneSettings:
        """Return these settings with what they leave open filled in from a problem's defaults."""
        return replace(
            self,
            learning_rate=defaults.learning_rate if self.learning_rate is None else self.learning_rate,
            num_steps=defaults.num_steps if self.num_steps is None and self.epochs is None else self.num_steps,
            batch_size=defaults.batch_size if self.batch_size is None else self.batch_size,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FinetuneSettings:
        """Return the settings that `to_json` wrote.

        Raises:
            InputError: If a setting is unknown or has no valid value.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise InputError(
                "settings", expected=f"names among {', '.join(known)}", got=", ".join(unknown), do="correct the name"
            )
        if "method" not in content:
            raise InputError("settings", expected="a method", got="none", do="add `method`")
        return cls(**content)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_whole(name: str, value: object, *, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value <= (value if most is None else most)):  # type: ignore[operator]
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(name, expected=f"a whole number {limits}", got=repr(value), do="give such a number")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        do = f"did you mean {close[0]!r}?" if close else "choose one of them"
        raise InputError(name, expected=f"one of {', '.join(choices)}", got=repr(value), do=do)
