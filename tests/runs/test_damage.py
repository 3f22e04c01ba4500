"""Truncations and flipped bits: a right answer or one clear error, never a wrong number."""

from __future__ import annotations

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_runs
from runs.make_schema_run import MANIFEST, NAMES, NEXT, write_step
from safetensors.numpy import save_file

from linchain_analysis.errors import DamageError, LinchainError
from linchain_analysis.runs import Run, RunWriter, load_run, read_snapshots, read_start, save_start
from linchain_analysis.runs.lock import LOCK
from linchain_analysis.runs.schema import TABLES, stream_name

# Of each table, how many rows a step has at most.
ROWS = {"steps": 1, "modules": 2, "factors": 6, "links": 2, "evals": 1, "health": 1, "snapshots": 1}
LOGGED = "reward"  # a column of `steps` that comes from another table
KINDS = {
    # (after, last step, how it ended) of each part; `stays` and `killed` leave streams, the latter with a cut tail.
    "live": [(0, 8, "killed")],
    "complete": [(0, 8, "complete")],
    "resumed": [(0, 6, "killed"), (4, 8, "complete")],
    "resumed-live": [(0, 5, "complete"), (4, 7, "stays"), (6, 8, "stays")],
}


@dataclass(frozen=True)
class Intact:
    """A run folder and everything that is read from it."""

    path: Path
    live_number: int | None
    frames: Mapping[str, pd.DataFrame]
    others: Mapping[str, Any]


def write_parts(path: Path, parts: list[tuple[int, int, str]]) -> None:
    for number, (after, last, how) in enumerate(parts):
        writer = RunWriter.resume(path, NEXT_FULL, after=after) if number else RunWriter(path, MANIFEST)
        if not number:
            factors = {f"{NAMES[0]}/{name}": np.arange(12.0, dtype=np.float32).reshape(6, 2) for name in ("A", "B")}
            save_start(path, factors, {f"{NAMES[0]}/A": np.eye(2)})
        for step in range(after + 1, last + 1):
            writer.append("evals", {"step": [step], "split": ["eval"], "metric": ["f1"], "value": [step / 2]})
            writer.append("scalars", {"step": [step], "name": [LOGGED], "value": [step / 4]})
            finding = {"finding": ["spike"], "subject": ["loss"], "began": [step % 2 == 0], "message": [f"at {step}"]}
            writer.append("health", {"step": [step], **finding})
            write_step(writer, step)
        if how == "complete":
            writer.close()
            continue
        if how == "killed":
            writer.append("factors", {"step": [last + 1], "module": [NAMES[0]], "factor": ["A"]})
        for stream in writer._streams.values():
            stream._file.close()
        writer._lock.release()
        if how == "killed":
            (path / "factors.arrows").write_bytes((path / "factors.arrows").read_bytes()[:-40])


NEXT_FULL = replace(NEXT, columns={**MANIFEST.columns, "modules": (*MANIFEST.columns["modules"], ("own", "float"))})


def read_frames(path: Path, damaged: str = "raise") -> tuple[Run, dict[str, pd.DataFrame]]:
    run = load_run(path, damaged=damaged)
    return run, {table: run.read(table) for table in ROWS}


def read_others(run: Run) -> dict[str, Any]:
    """What is no table: the start, snapshots taken apart, what the manifest says, a column computed on demand."""
    found: dict[str, Any] = {}
    for number, arrays in enumerate(read_start(run.path)):
        found |= {f"start/{number}/{name}": array.tolist() for name, array in arrays.items()}
    found["snapshots"] = [
        (snapshot.step, snapshot.modules, [np.nan_to_num(factor).tolist() for factor in snapshot.cores.before])
        for snapshot in read_snapshots(run)
    ]
    found["manifest"] = run.manifest
    return found


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Intact]:
    folder = tmp_path_factory.mktemp("intact")
    found = {}
    for kind, parts in KINDS.items():
        path = folder / kind
        write_parts(path, parts)
        run, frames = read_frames(path)
        assert {len(frames[table]) / rows for table, rows in ROWS.items() if table != "snapshots"} == {8.0}
        live = run.manifest.number if not run.manifest.tables else None
        found[kind] = Intact(path, live, frames, read_others(run))
    return found


def is_prefix(frame: pd.DataFrame, whole: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(frame, whole.iloc[: len(frame)], check_categorical=False, check_exact=True)
    except AssertionError:
        return False
    return True


def starts_alike(frames: Mapping[str, pd.DataFrame], whole: Mapping[str, pd.DataFrame]) -> bool:
    """Whether each table holds the first rows of what it should; what was logged beside steps, the first values."""
    for table, frame in frames.items():
        expected = whole[table]
        if table == "steps":
            logged = frame[LOGGED].to_numpy() if LOGGED in frame else np.full(len(frame), np.nan)
            there = ~np.isnan(logged)
            if there.any() and not there[: there.sum()].all():
                return False
            if (logged[there] != expected[LOGGED].to_numpy()[: len(frame)][there]).any():
                return False
            frame, expected = frame.drop(columns=LOGGED, errors="ignore"), expected.drop(columns=LOGGED)
        if len(frame) == 0:  # types of columns that only some parts have are those of nothing
            continue
        if not is_prefix(frame, expected[list(frame.columns)]):
            return False
    return True


def damage(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    if rng.random() < 0.4:
        file.write_bytes(data[: rng.randrange(len(data))])
        return "cutting"
    position, bit = rng.randrange(len(data)), rng.randrange(8)
    data[position] ^= 1 << bit
    file.write_bytes(data)
    return f"flipping bit {bit} of byte {position} of"


def judge(path: Path, intact: Intact, file: Path, how: str) -> str:
    """Read a damaged folder in both ways; return what came of it: `right`, `prefix`, `refused` or what is wrong."""
    live = intact.live_number is not None and file.name in {stream_name(t, intact.live_number) for t in TABLES}
    place = f"{how} {file.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, frames = read_frames(path, damaged="drop")
            if not starts_alike(frames, intact.frames):
                return f"wrong numbers with damaged='drop' after {place}"
        except LinchainError:
            pass
        except Exception as error:
            return f"{error!r} with damaged='drop' after {place}"
    try:
        run, frames = read_frames(path)
        others = read_others(run)
    except LinchainError:
        return "refused"
    except Exception as error:
        return f"{error!r} after {place}"
    missing = {table: len(intact.frames[table]) - len(frame) for table, frame in frames.items()}
    exact = all(is_prefix(frames[table], intact.frames[table]) for table in ROWS)
    if exact and not any(missing.values()) and others == intact.others:
        return "right"
    # A flipped length of the very last batch looks like a batch that is being written; no more may be missing.
    much = how != "cutting" and any(missing[table] > rows for table, rows in ROWS.items())
    if live and not much and starts_alike(frames, intact.frames):
        return "prefix"
    return f"wrong numbers after {place}"


def fuzz(intact: Intact, copy: Path, num_cases: int, seed: int = 0) -> Counter[str]:
    outcomes: Counter[str] = Counter(tried=num_cases)
    rng = random.Random(seed)
    shutil.copytree(intact.path, copy)
    files = sorted(file for file in copy.iterdir() if file.stat().st_size and file.name != LOCK)
    for _ in range(num_cases):
        file = rng.choice(files)
        how = damage(file, rng)
        outcomes[judge(copy, intact, file, how)] += 1
        shutil.copy(intact.path / file.name, file)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_damage_never_reads_as_numbers(intact: dict[str, Intact], kind: str, tmp_path: Path) -> None:
    outcomes = fuzz(intact[kind], tmp_path / "copy", 30)
    assert set(outcomes) <= {"tried", "right", "prefix", "refused"}, outcomes
    assert outcomes["refused"] > 5


@pytest.mark.slow
def test_a_thousand_damaged_runs(intact: dict[str, Intact], tmp_path: Path) -> None:
    together: Counter[str] = Counter()
    for seed, kind in enumerate(KINDS, start=1):
        outcomes = fuzz(intact[kind], tmp_path / kind, 250, seed)
        together += outcomes
        print(kind, report(outcomes))
    print("together", report(together))
    assert set(together) <= {"tried", "right", "prefix", "refused"}, together


def report(outcomes: Counter[str]) -> str:
    known = ("tried", "right", "prefix", "refused")
    wrong = sum(number for outcome, number in outcomes.items() if outcome not in known)
    return ", ".join(f"{name} {outcomes[name]}" for name in known) + f", wrong {wrong}"


def test_every_flipped_bit_of_a_start_is_found(tmp_path: Path) -> None:
    save_start(tmp_path, {"m/A": np.arange(4, dtype=np.float32)}, {})
    file = tmp_path / "initial_factors.safetensors"
    data, expected = file.read_bytes(), {"m/A": [0.0, 1.0, 2.0, 3.0]}
    num_refused = 0
    for position in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            found, _ = read_start(tmp_path)
        except DamageError:
            num_refused += 1
        else:  # in the name of the checksum, or what fills the header up
            assert {name: array.tolist() for name, array in found.items()} == expected
    assert num_refused > 0.7 * len(data) * 8


def test_a_start_without_checksum_is_read(tmp_path: Path) -> None:
    """As schema versions 1 and 2 kept it."""
    save_file({"m/A": np.ones(2)}, tmp_path / "initial_factors.safetensors")
    assert read_start(tmp_path)[0]["m/A"].tolist() == [1.0, 1.0]


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
