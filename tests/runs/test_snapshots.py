"""Chains that are packed come back bit for bit, and damage is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from chain_cores import SHAPES, complete_cores, every_shape, random_chain
from runs.make_schema_run import MANIFEST, NAMES
from safetensors.numpy import save

from linchain_analysis.errors import DamageError
from linchain_analysis.measures.cores import Cores
from linchain_analysis.runs import RunWriter, load_run, pack_chain, read_snapshots
from linchain_analysis.runs.snapshots import unpack_chains


def draw(shape: object, num_chains: int = 3, **options: float) -> Cores:
    rng = np.random.default_rng(0)
    return complete_cores([random_chain(rng, shape, **options) for _ in range(num_chains)])  # type: ignore[arg-type]


def assert_same(found: object, expected: object) -> None:
    """Bit for bit, also the dtype."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):  # type: ignore[arg-type]
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


@every_shape
def test_chains_come_back_exactly(shape: object) -> None:
    cores = draw(shape)
    assert cores.tokens is not None and cores.start_squares and cores.base_norm is not None
    found, whole = unpack_chains([pack_chain(cores, j) for j in range(3)])
    assert_same(found, cores)
    assert whole == [{}, {}, {}]


def test_what_nobody_asked_for_stays_away() -> None:
    cores = replace(draw(SHAPES["n=2"]), gradient=None, start_squares=(), learning_rate=None, base_norm=None)
    cores = replace(cores, tokens=None, epsilon=2.0**-8)
    found, _ = unpack_chains([pack_chain(cores, j) for j in range(3)])
    assert_same(found, cores)


def test_chains_that_started_elsewhere_keep_where() -> None:
    cores = draw(SHAPES["n=1"], moved=0.3)
    assert cores.since_start is not None and cores.start_scale is not None
    assert_same(unpack_chains([pack_chain(cores, j) for j in range(3)])[0], cores)


def test_numbers_that_are_not_finite_come_back() -> None:
    cores = draw(SHAPES["n=1"])
    broken = cores.before[1].copy()
    broken[1, 0] = np.nan, np.inf, -np.inf, -0.0
    cores = replace(cores, before=(cores.before[0], broken, cores.before[2]), scale=np.array([np.nan, 0.0, -1.0]))
    found, _ = unpack_chains([pack_chain(cores, j) for j in range(3)])
    assert_same(found, cores)
    assert np.signbit(found.before[1][1, 0, 3])


def test_whole_gradients_stay_with_their_chain_in_their_dtype() -> None:
    cores = draw(SHAPES["n=1"], num_chains=2)
    gradients = [{"A": np.full((9, 4), j + 0.5, dtype=np.float32), "B": np.full((4, 12), np.nan)} for j in range(2)]
    found, whole = unpack_chains([pack_chain(cores, j, gradients[j]) for j in range(2)])
    assert_same(found, cores)
    for mine, given in zip(whole, gradients, strict=True):
        assert set(mine) == {"A", "B"}
        for name, gradient in given.items():
            assert_same(mine[name], gradient)


def write_snapshots(path: Path, steps: Sequence[int], *, close: bool, **replaced: bytes) -> tuple[Cores, Cores]:
    """Snapshots of two modules of different shape at each of `steps`."""
    parts = draw(SHAPES["n=1"], 1), draw(SHAPES["n=2"], 1)
    writer = RunWriter(path, MANIFEST)
    for step in steps:
        tensors = [pack_chain(parts[0], 0), pack_chain(parts[1], 0, {"A": np.ones((11, 3))})]
        tensors[0] = replaced.get("first", tensors[0])
        writer.append("snapshots", {"step": [step] * 2, "module": list(NAMES), "tensors": tensors})
        writer.append("steps", {"step": [step]})
    if close:
        writer.close()
    return parts


@pytest.mark.parametrize("close", [False, True])
def test_snapshots_are_read_step_by_step_and_shape_by_shape(tmp_path: Path, close: bool) -> None:
    parts = write_snapshots(tmp_path / "run", [1, 5], close=close)
    found = list(read_snapshots(load_run(tmp_path / "run")))
    assert [(snapshot.step, snapshot.modules) for snapshot in found] == [(s, [n]) for s in (1, 5) for n in NAMES]
    for snapshot, cores in zip(found, parts * 2, strict=True):
        assert_same(snapshot.cores, cores)
    assert found[0].whole_gradients == {NAMES[0]: {}}
    np.testing.assert_array_equal(found[1].whole_gradients[NAMES[1]]["A"], np.ones((11, 3)))


def test_chains_of_one_shape_are_stacked(tmp_path: Path) -> None:
    cores = draw(SHAPES["n=1"], 2)
    writer = RunWriter(tmp_path / "run", MANIFEST)
    # The other way round than in the manifest: what a module has stays with it.
    tensors = [pack_chain(cores, 1, {"A": np.zeros((9, 4))}), pack_chain(cores, 0)]
    writer.append("snapshots", {"step": [3, 3], "module": [NAMES[1], NAMES[0]], "tensors": tensors})
    writer.append("steps", {"step": [3]})
    (snapshot,) = read_snapshots(load_run(tmp_path / "run"))
    assert snapshot.modules == [NAMES[1], NAMES[0]]
    np.testing.assert_array_equal(snapshot.cores.before[0], cores.before[0][::-1])
    assert list(snapshot.whole_gradients[NAMES[1]]) == ["A"] and not snapshot.whole_gradients[NAMES[0]]


def test_a_snapshot_of_an_unfinished_step_is_left_out(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", MANIFEST)
    tensors = [pack_chain(draw(SHAPES["n=1"], 1), 0)]
    writer.append("snapshots", {"step": [1], "module": [NAMES[0]], "tensors": tensors})
    assert list(read_snapshots(load_run(tmp_path / "run"))) == []


@pytest.mark.parametrize(
    "tensors",
    [b"", b"nothing", pack_chain(draw(SHAPES["n=1"], 1), 0)[:-8], save({"size": np.array([9, 12])}), save({})],
    ids=["empty", "no safetensors", "cut", "no factors", "no size"],
)
def test_bytes_that_are_no_chain_are_damage(tmp_path: Path, tensors: bytes) -> None:
    write_snapshots(tmp_path / "run", [1], close=True, first=tensors)
    with pytest.raises(DamageError, match="expected snapshots as they were written"):
        list(read_snapshots(load_run(tmp_path / "run")))


@pytest.mark.parametrize("close", [False, True])
def test_a_flipped_bit_anywhere_in_the_table_is_damage(tmp_path: Path, close: bool) -> None:
    parts = write_snapshots(tmp_path / "run", [1], close=close)
    (file,) = (tmp_path / "run").glob("snapshots.*")
    data = file.read_bytes()
    num_errors = 0
    for position in range(4, len(data), len(data) // 60):
        damaged = bytearray(data)
        damaged[position] ^= 16
        file.write_bytes(damaged)
        try:
            found = list(read_snapshots(load_run(tmp_path / "run")))
        except DamageError:
            num_errors += 1
        else:  # a byte that nothing depends on, or the length of the one batch, as while it is being written
            for snapshot, cores in zip(found, parts, strict=False):
                assert_same(snapshot.cores, cores)
    assert num_errors > 50
