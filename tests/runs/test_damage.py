"""Truncations and flipped bits: a right answer or one clear error, never a wrong number."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest
import small_runs

from linchain_analysis.errors import DamageError, RunError
from linchain_analysis.runs import load_run

ROWS_OF_A_BATCH = {"steps": 1, "modules": 2, "factors": 6, "evals": 1}
FRAMES = tuple(ROWS_OF_A_BATCH)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, pd.DataFrame]]]:
    folder = tmp_path_factory.mktemp("intact")
    found = {}
    for kind in ("live", "complete"):
        small_runs.write_run(folder / kind, num_steps=12, close=kind == "complete")
        run = load_run(folder / kind)
        found[kind] = (folder / kind, {table: getattr(run, table) for table in FRAMES})
    return found


def is_prefix(frame: pd.DataFrame, whole: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(frame, whole.iloc[: len(frame)], check_categorical=False)
    except AssertionError:
        return False
    return True


def damage_and_read(folder: Path, whole: dict[str, pd.DataFrame], copy: Path, rng: random.Random) -> str:
    """Damage one file of a copy; return what came of it: `right`, `prefix`, `error` or what is wrong."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = rng.choice(sorted(path for path in copy.iterdir() if path.stat().st_size))
    data = bytearray(file.read_bytes())
    truncated = rng.random() < 0.4
    if truncated:
        data = data[: rng.randrange(len(data))]
    else:
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    try:
        run = load_run(copy)
        frames = {table: getattr(run, table) for table in FRAMES}
    except RunError:
        return "error"
    if all(len(frames[table]) == len(whole[table]) and is_prefix(frames[table], whole[table]) for table in FRAMES):
        return "right"
    if file.suffix == ".arrows" and all(is_prefix(frames[table], whole[table]) for table in FRAMES):
        # A flipped length of the very last batch looks like a batch that is being written; no more may be missing.
        last_batch = all(len(whole[table]) - len(frames[table]) <= ROWS_OF_A_BATCH[table] for table in FRAMES)
        if truncated or last_batch:
            return "prefix"
    return f"wrong numbers after {'cutting' if truncated else 'flipping a bit of'} {file.name}"


def fuzz(folder: Path, whole: dict[str, pd.DataFrame], copy: Path, num_cases: int) -> dict[str, int]:
    outcomes: dict[str, int] = {}
    rng = random.Random(0)
    for _ in range(num_cases):
        outcome = damage_and_read(folder, whole, copy, rng)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


@pytest.mark.parametrize("kind", ["live", "complete"])
def test_damage_never_reads_as_numbers(intact, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outcomes = fuzz(*intact[kind], tmp_path / "copy", 120)
    assert set(outcomes) <= {"right", "prefix", "error"}, outcomes
    assert outcomes["error"] > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "complete"])
def test_a_thousand_damaged_runs(intact, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outcomes = fuzz(*intact[kind], tmp_path / "copy", 1000)
    print(kind, outcomes)
    assert set(outcomes) <= {"right", "prefix", "error"}, outcomes


def test_what_stands_before_the_damage_can_be_had(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run", num_steps=10, close=False)
    whole = load_run(tmp_path / "run").modules
    file = tmp_path / "run" / "modules.arrows"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match=r"modules\.arrows: expected a stream of intact batches"):
        load_run(tmp_path / "run").modules  # noqa: B018
    with warnings.catch_warnings(record=True):
        part = load_run(tmp_path / "run", damaged="drop").modules
    assert 0 < len(part) < len(whole)
    assert is_prefix(part, whole)


def test_a_missing_table_of_a_complete_run_is_damage(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    (tmp_path / "run" / "factors.parquet").unlink()
    run = load_run(tmp_path / "run")
    assert len(run.steps) == 3
    with pytest.raises(DamageError, match="no such file"):
        run.factors  # noqa: B018
