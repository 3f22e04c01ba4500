"""What can be asked of a run: columns that the tracker records by itself, and measures in a file of the user's."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from linchain_analysis.errors import InputError, LinchainError
from linchain_analysis.measures.registry import BUILT_IN, NOISE_COLUMNS, Measure, all_measures
from linchain_analysis.vocabulary import COLUMNS, Column, columns_of

RECORDED = "recorded by the tracker"


def recorded_columns() -> dict[str, tuple[Column, ...]]:
    """Return the columns of each group that the tracker records by itself."""
    known = [column for table in ("modules", "factors", "links") for column in columns_of(table)]
    groups = {group: tuple(column for column in known if column.name in names) for group, names in BUILT_IN.items()}
    return {**groups, "noise": NOISE_COLUMNS}


def recorded_names() -> set[str]:
    """Return the names of these groups, and of all columns that a run has without measures."""
    groups = recorded_columns()
    return {*groups, *(column.name for column in [*COLUMNS, *NOISE_COLUMNS] if not column.key)}


def load_measures(path: Path) -> list[Measure]:
    """Run a file and return the measures that it marks with `@measure` or `@spectral_measure`.

    Raises:
        InputError: There is no such file, it cannot be run, or it marks none.
    """
    place = f"--measure {path}"
    if not path.is_file():
        raise InputError(place, expected="a file that marks measures", got="no such file", do="check the path")
    all_measures()  # those of the package first, so that a name taken there is refused
    title = f"_linchain_measures_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except LinchainError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError(place, expected="a file that Python can run", got=got, do="mend it") from error
    found = [measure for measure in all_measures().values() if measure.function.__module__ == title]
    if not found:
        raise InputError(
            place,
            expected="a function marked with @measure or @spectral_measure of linchain_analysis.measures.registry",
            got="none",
            do="mark one",
        )
    return found
