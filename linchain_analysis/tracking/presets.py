"""What is recorded: a preset by its cost, or measures by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from linchain_analysis.errors import InputError
from linchain_analysis.measures.registry import (
    BUILT_IN,
    NOISE_COLUMNS,
    Measure,
    all_measures,
    find_measure,
    measure_columns,
)

SAMPLE_EVERY = 50
PRESETS = ("light", "standard", "full")
NOISE = "noise"
_NAMES = (*BUILT_IN, NOISE)


@dataclass(frozen=True)
class Selection:
    """What is recorded beyond norms, which always are.

    Attributes:
        name: The preset, or `custom`.
        cosines: Cosines of gradients with the previous ones and with updates (keeps one copy of the gradients).
        spectra: Singular values of delta and of its update; without them their norms alone.
        noise: Gradient noise scale, where gradients are accumulated.
        measures: Measures of the registry.
        snapshots: Whether snapshots of the small cores are kept without asking for them.
    """

    name: str
    cosines: bool
    spectra: bool
    noise: bool = False
    measures: tuple[Measure, ...] = ()
    snapshots: bool = False

    def needs(self, what: str) -> bool:
        """Whether a measure needs `what` from the probes."""
        return any(what in chosen.needs for chosen in self.measures)


def select(preset: str | None = None, measures: Sequence[str | Callable[..., object]] | None = None) -> Selection:
    """Return what `preset` records, what `measures` record, or both together; norms always.

    Args:
        preset: `light`, `standard` or `full`; where neither is given, `standard`.
        measures: Names of measures or of their columns, or functions marked as measures.

    Raises:
        InputError: An unknown name.
    """
    if measures is None:
        return _preset(find_preset(preset or "standard"))
    custom = _custom(measures)
    if preset is None:
        return custom
    base = _preset(find_preset(preset))
    known = {measure.name for measure in base.measures}
    return replace(
        base,
        cosines=base.cosines or custom.cosines,
        spectra=base.spectra or custom.spectra,
        noise=base.noise or custom.noise,
        measures=(*base.measures, *(measure for measure in custom.measures if measure.name not in known)),
    )


def _preset(preset: str) -> Selection:
    if preset == "light":
        return Selection(preset, cosines=False, spectra=False, measures=_of_level("light"))
    if preset == "standard":
        return Selection(preset, cosines=True, spectra=True, measures=_of_level("light", "standard"))
    return Selection(
        preset,
        cosines=True,
        spectra=True,
        noise=True,
        measures=_of_level("light", "standard", "full"),
        snapshots=True,
    )


def find_preset(name: str) -> str:
    """Return `name` if it is that of a preset.

    Raises:
        InputError: It is not.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise InputError(
            "preset",
            expected=" or ".join(PRESETS),
            got=repr(name),
            do=f"did you mean {close[0]!r}?" if close else "pass one of these",
        )
    return name


def check_intervals(sample_every: object, snapshot_every: object, gradients: object = "cores") -> None:
    """Refuse intervals that are no number of steps, and unknown ways to keep gradients.

    Raises:
        InputError: One of them.
    """
    for name, value in (("sample_every", sample_every), ("snapshot_every", snapshot_every)):
        if value is None and name == "snapshot_every":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(name, expected="a number of steps ≥ 1", got=repr(value), do="pass a whole number")
    if gradients not in ("cores", "full"):
        raise InputError("gradients", expected="cores or full", got=repr(gradients), do="pass one of these")


def check_patterns(include: str | None, exclude: str | None) -> None:
    """Refuse what is no regular expression.

    Raises:
        InputError: One of them.
    """
    for name, pattern in (("include", include), ("exclude", exclude)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise InputError(
                name, expected="a regular expression", got=f"{pattern!r} ({error})", do="escape what is meant as it is"
            ) from None


def _of_level(*levels: str) -> tuple[Measure, ...]:
    return tuple(found for found in all_measures().values() if found.level in levels)


def _custom(names: Sequence[str | Callable[..., object]]) -> Selection:
    if isinstance(names, str):
        raise InputError("measures", expected="a list of names", got=repr(names), do=f"pass [{names!r}]")
    built_in: set[str] = set()
    chosen: dict[str, Measure] = {}
    for name in names:
        group = _built_in_group(name)
        if group is not None:
            built_in.add(group)
            continue
        found = _find(name)
        if found.level == "reading":  # computed from spectra when they are read
            built_in.add("spectra")
        else:
            chosen[found.name] = found
    return Selection(
        "custom",
        cosines="cosines" in built_in,
        spectra="spectra" in built_in,
        noise=NOISE in built_in,
        measures=tuple(chosen.values()),
    )


def _built_in_group(name: object) -> str | None:
    groups = {**BUILT_IN, NOISE: tuple(column.name for column in NOISE_COLUMNS)}
    return next((group for group, columns in groups.items() if name == group or name in columns), None)


def _find(name: str | Callable[..., object]) -> Measure:
    if callable(name):
        found = next((m for m in all_measures().values() if m.function is name), None)
        if found is None:
            raise InputError(
                "measures",
                expected="a function marked with linchain_analysis.measures.registry.measure",
                got=getattr(name, "__name__", repr(name)),
                do="mark it with the columns it fills in",
            )
        return found
    try:
        return find_measure(name)
    except InputError as error:
        known = sorted({*_NAMES, *all_measures()})
        columns = [*(column for group in BUILT_IN.values() for column in group), *(c.name for c in measure_columns())]
        close = difflib.get_close_matches(str(name), [*known, *columns], n=1)
        do = f"did you mean {close[0]!r}?" if close else error.do
        raise InputError("measures", expected=f"names among {', '.join(known)}", got=repr(name), do=do) from None
