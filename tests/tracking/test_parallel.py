"""Trainings on two processes: every number is that of the same global batches on one, and one folder is written."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_training
import torch

from linchain_analysis import Tracker, load_run
from linchain_analysis.probes import find_chains
from linchain_analysis.tracking import ranks
from linchain_analysis.tracking.ranks import PeerError, Ranks

if not torch.distributed.is_available():
    pytest.skip("torch without its distributed package", allow_module_level=True)

SCRIPTS = Path(__file__).with_name("scripts")
# What only one process that sees every token can tell.
OF_ONE = "gradient_capture|gradient_preconditioned_cosine|full_grad_norm|data_weighted|noise_"
OWN = ("seconds", "track_seconds")


@dataclass(frozen=True)
class Outcome:
    """What the processes of one training left."""

    codes: list[int]
    out: str
    errors: list[str]

    def said(self, rank: int) -> list[str]:
        """What this package said on one rank."""
        return [line for line in self.errors[rank].splitlines() if line.startswith(("tracker", "linchain_analysis"))]


def start(script: str, folder: Path, size: int, *arguments: str, launcher: Sequence[str] = ()) -> Callable[[], Outcome]:
    """Start a training on `size` processes in `folder`; returns how to wait for its end."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    joined = size > 1 or "ranks=1" in arguments
    if joined:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPTS / script), *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if joined else environment,
        )
        for rank in range(size)
    ]

    def wait() -> Outcome:
        try:
            ended = [process.communicate(timeout=150) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return Outcome([p.returncode for p in processes], "".join(out for out, _ in ended), [e for _, e in ended])

    return wait


@functools.cache
def _one(folder: Path, script: str, arguments: tuple[str, ...]) -> Path:
    """The folder of the same training on one process."""
    done = start(script, folder, 1, *arguments)()
    assert done.codes == [0], done.errors
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("one")
    return lambda script, *arguments: _one(root / str(abs(hash((script, arguments)))), script, arguments)


def run_both(
    one: Callable[..., Path], folder: Path, setup: str, *options: str, size: int = 2, alone: Sequence[str] = ()
) -> Outcome:
    """Run `parallel.py` on `size` processes and on one, and hold that every recorded number is the same."""
    told = ("tracker=run", "live=live.pt", *options)
    wait = start("parallel.py", folder, size, setup, *told)
    reference = one("parallel.py", "one", f"ranks={size}", *told, *alone)
    done = wait()
    assert done.codes == [0] * size, done.errors
    assert sorted(path.name for path in folder.iterdir()) == ["live.pt", "run"]
    assert not any(done.said(rank) for rank in range(1, size))
    narrow = "dtype=float32" in options
    compare_live(folder / "live.pt", reference / "live.pt", 2e-4 if narrow else 1e-9)
    compare_tables(folder / "run", reference / "run", 2e-4 if narrow else 1e-6)
    return done


def compare_live(path: Path, other: Path, tolerance: float) -> None:
    """Compare what was read before it was stored in float32."""
    for step, expected in zip(*(torch.load(p, weights_only=False) for p in (path, other)), strict=True):
        assert step.keys() == expected.keys()
        for name, values in step.items():
            # Cosines and small singular values are sums of terms that cancel.
            scale = float(np.abs(expected[name]).max(initial=0)) if "spectrum" in name else 1.0
            atol = tolerance * (scale if "spectrum" in name or "cosine" in name else 0.0)
            np.testing.assert_allclose(values, expected[name], rtol=tolerance, atol=atol, err_msg=name)


def compare_tables(path: Path, other: Path, tolerance: float) -> None:
    """Compare every column of two runs but times."""
    run, expected = load_run(path), load_run(other)
    assert (run.status, run.manifest.modules) == ("complete", expected.manifest.modules)
    for table in ("steps", "modules", "factors", "links"):
        one, two = getattr(run, table), getattr(expected, table)
        assert list(one.columns) == list(two.columns) and len(one) == len(two)
        for name in one.columns:
            if name not in OWN and not pd.Series([name]).str.match(OF_ONE).all():
                _compare_column(table, name, one[name], two[name], tolerance)


def _compare_column(table: str, name: str, got: pd.Series, expected: pd.Series, tolerance: float) -> None:
    lists = [value for value in expected if isinstance(value, (list, np.ndarray))]
    if lists:
        for a, b in zip(got, expected, strict=True):
            a, b = np.atleast_1d(a).astype(float), np.atleast_1d(b).astype(float)
            atol = tolerance * float(np.abs(b).max(initial=0))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=f"{table}.{name}")
    elif pd.api.types.is_numeric_dtype(expected) or pd.api.types.is_bool_dtype(expected):
        a, b = got.astype(float), expected.astype(float)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"{table}.{name}")
    else:
        assert got.astype(str).tolist() == expected.astype(str).tolist()


def test_data_parallel(one: Callable[..., Path], tmp_path: Path) -> None:
    run_both(one, tmp_path / "ddp", "ddp", "method=linchain")


def test_fully_sharded(one: Callable[..., Path], tmp_path: Path) -> None:
    # Accumulated without communication; 5 rows on 2 processes are 3 and 2.
    run_both(one, tmp_path / "fsdp", "fsdp", "method=linchain")


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
def test_the_full_preset(setup: str, one: Callable[..., Path], tmp_path: Path) -> None:
    done = run_both(one, tmp_path / setup, setup, "method=linchain", "preset=full")
    (warning,) = [line for line in done.said(0) if line.startswith("tracker")]
    assert "gradient_capture" in warning and "noise" in warning
    run = load_run(tmp_path / setup / "run")
    assert run.modules["gradient_capture"].isna().all() and run.steps["noise_scale"].isna().all()
    assert len(run.read("snapshots", ["step"])) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "options"),
    [
        ("ddp", ["method=lora"]),
        ("fsdp", ["method=lora", "sync=1", "clip=0"]),
        ("fsdp", ["method=linchain", "shard=layers"]),
        ("fsdp", ["method=linchain", "shard=chains"]),
        ("fsdp", ["method=linchain", "shard=columns", "r=4"]),
        ("fsdp", ["method=linchain", "shard=root", "r=1", "look=1"]),  # the second process has no row of A
        ("fsdp", ["method=lora", "init=pissa"]),  # whose product is not zero at the start
        ("ddp", ["method=lora", "init=pissa"]),
        ("ddp", ["method=linchain", "dtype=float32", "scaler=1"]),
        ("fsdp", ["method=linchain", "dtype=float32", "scaler=1"]),
        ("fsdp", ["method=lora", "every=3", "steps=7"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_ways_to_train_together(setup: str, options: list[str], one: Callable[..., Path], tmp_path: Path) -> None:
    run_both(one, tmp_path / "run", setup, *options)


@pytest.mark.slow
def test_four_processes_that_shard_in_pairs(one: Callable[..., Path], tmp_path: Path) -> None:
    run_both(one, tmp_path / "hsdp", "hsdp", "method=linchain", "steps=3", "ranks=4", size=4)


@pytest.mark.slow
def test_one_process_that_shards(one: Callable[..., Path], tmp_path: Path) -> None:
    run_both(one, tmp_path / "fsdp", "fsdp", "method=linchain", "ranks=1", size=1)


@pytest.mark.slow
def test_flat_pieces_are_refused(tmp_path: Path) -> None:
    done = start("parallel.py", tmp_path, 2, "fsdp1", "clip=0", "tracker=run")()
    assert done.codes == [0, 0], done.errors
    assert "FullyShardedDataParallel (FSDP1" in "".join(done.said(0))
    run = load_run(tmp_path / "run")
    assert len(run.modules) == len(run.factors) == 0
    assert run.steps["grad_norm"].isna().all() and run.steps["loss"].notna().all()


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
def test_a_training_is_the_same_without_the_tracker(setup: str, tmp_path: Path) -> None:
    plain = start("parallel.py", tmp_path / "plain", 2, setup, "method=linchain", "weights=weights.pt")()
    tracked = start(
        "parallel.py", tmp_path / "tracked", 2, setup, "method=linchain", "weights=weights.pt", "tracker=run"
    )()
    assert (plain.codes, tracked.codes) == ([0, 0], [0, 0]), tracked.errors
    losses = [sorted(line for line in o.out.splitlines() if line.startswith("step")) for o in (plain, tracked)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    weights, expected = (torch.load(tmp_path / name / "weights.pt") for name in ("tracked", "plain"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("parallel_trainer.py", ["out=out"]),
        ("parallel_accelerate.py", ["ddp"]),
        ("parallel_accelerate.py", ["fsdp"]),
        ("parallel_accelerate.py", ["fsdp", "policy=peft"]),
    ],
)
@pytest.mark.parametrize("launched", [False, True], ids=["own tracker", "launched"])
def test_libraries(script: str, options: list[str], launched: bool, one: Callable[..., Path], tmp_path: Path) -> None:
    launcher = ["-m", "linchain_analysis.track", "--out", "run"] if launched else []
    told = [] if launched else ["tracker=run"]
    wait = start(script, tmp_path / "two", 2, *options, *told, launcher=launcher)
    reference = one(script, *("one" if option in ("ddp", "fsdp") else option for option in options), "tracker=run")
    done = wait()
    assert done.codes == [0, 0], done.errors
    assert not done.said(1)
    assert len(list((tmp_path / "two").glob("run*"))) == 1
    compare_tables(tmp_path / "two" / "run", reference / "run", 1e-4)  # models in float32


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
def test_a_launched_loop_that_accumulates_before_it_communicates(
    setup: str, one: Callable[..., Path], tmp_path: Path
) -> None:
    launcher = ["-m", "linchain_analysis.track", "--out", "run"]
    wait = start("parallel.py", tmp_path / "two", 2, setup, "method=linchain", launcher=launcher)
    reference = one("parallel.py", "one", "ranks=2", "tracker=run", "live=live.pt", "method=linchain")
    done = wait()
    assert done.codes == [0, 0], done.errors
    compare_tables(tmp_path / "two" / "run", reference / "run", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_fault_on_one_rank_ends_tracking_on_both(setup: str, where: int, tmp_path: Path) -> None:
    done = start("parallel.py", tmp_path, 2, setup, "tracker=run", "fault=1", f"where={where}")()
    assert done.codes == [0, 0], done.errors
    assert done.out.count("step rank=") == 8
    assert "No space left" in "".join(done.said(where))
    if where:
        assert "tracking had ended on rank 1" in "".join(done.said(0))
    else:
        assert not done.said(1)
    assert len(load_run(tmp_path / "run").steps) == 2
    assert load_run(tmp_path / "run").status == "failed"


@pytest.mark.slow
def test_a_tracker_on_rank_0_alone(tmp_path: Path) -> None:
    done = start("parallel.py", tmp_path, 2, "ddp", "tracker=run", "only=1", "meeting=1")()
    assert done.codes == [0, 0], done.errors
    assert "got none in some; `loss` is that of rank 0 alone" in "".join(done.said(0))
    said = [line for line in done.out.splitlines() if line.startswith("step rank=0")]
    losses = [float(line.rpartition("loss=")[2]) for line in said]
    np.testing.assert_allclose(load_run(tmp_path / "run").steps["loss"], losses, rtol=1e-6)


@pytest.mark.slow
def test_a_tracker_of_one_part_of_the_parameters(tmp_path: Path) -> None:
    done = start("parallel.py", tmp_path, 2, "fsdp", "tracker=run", "only=1", "meeting=1")()
    assert done.codes == [0, 0], done.errors
    assert "make it on every rank" in "".join(done.said(0))
    assert len(load_run(tmp_path / "run").steps) == 0


@pytest.mark.slow
def test_a_rank_that_runs_out_of_data(tmp_path: Path) -> None:
    done = start("parallel.py", tmp_path, 2, "ddp", "tracker=run", "early=2", "exchange=2", "passes=1")()
    assert done.codes == [0, 0], done.errors
    assert done.out.count("step rank=0") == 4
    assert "does not answer" in "".join(done.said(0))
    assert len(load_run(tmp_path / "run").steps) == 2


def test_parameters_that_deepspeed_keeps_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_training.build()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    assert all("DeepSpeed ZeRO-3" in str(chain.refused) for chain in find_chains(model))
    optimizer = small_training.optimize(model)
    with Tracker(model, optimizer, tmp_path / "run"):
        small_training.train_step(model, optimizer, 1)
    assert "got those of DeepSpeed ZeRO-3" in caplog.text
    run = load_run(tmp_path / "run")
    assert len(run.modules) == 0 and run.steps["grad_norm"].isna().all() and run.steps["loss"].notna().all()


# --- the meeting, in threads -----------------------------------------------------------------------------------------


def meet(monkeypatch: pytest.MonkeyPatch, *behaviours: Callable[[Ranks], Any]) -> list[Any]:
    """Let each of some ranks behave in a thread of its own, and return what they returned or raised."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ranks, "EXCHANGE_TIMEOUT_S", 1.0)
    found: list[Any] = [None] * len(behaviours)
    ranks._NUM_MEETINGS.clear()
    made = []
    for rank in range(len(behaviours)):
        ranks._NUM_MEETINGS.clear()  # each is the first in its process
        made.append(Ranks(store, rank, len(behaviours), "a model"))

    def behave(rank: int) -> None:
        try:
            found[rank] = behaviours[rank](made[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=behave, args=(rank,)) for rank in range(len(behaviours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_all_learn_what_each_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in meet(monkeypatch, lambda r: r.exchange([1.0, 2.0]), lambda r: r.exchange([3.0, float("inf")])):
        np.testing.assert_array_equal(told, [[1, 2], [3, np.inf]])


def test_one_that_comes_late_goes_on_alone_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(own: Ranks) -> Any:
        threading.Event().wait(0.8)
        return own.exchange([3.0]), own.alone

    first, second = meet(monkeypatch, lambda r: (r.exchange([1.0]), r.alone), late)
    assert first[0].tolist() == [[1.0]] and second[0].tolist() == [[3.0]]
    assert first[1] and second[1]


def test_one_that_could_not_begin_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = meet(monkeypatch, lambda r: r.refuse(), lambda r: (r.exchange([1.0]), r.alone))
    assert told[1]


def test_all_end_when_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def stays(own: Ranks) -> Any:
        own.exchange([1.0])
        own.exchange([1.0])

    def leaves(own: Ranks) -> None:
        own.exchange([1.0])
        own.leave(1)
        own.leave(1)  # which is due once

    error, _ = meet(monkeypatch, stays, leaves)
    assert isinstance(error, PeerError) and "rank 1" in str(error)


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "is silent"])
def test_one_that_is_gone_is_not_waited_for(closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def goes(own: Ranks) -> None:
        own.exchange([1.0])
        if closes:
            own.close()
        done.wait(10)

    def stays(own: Ranks) -> Any:
        own.exchange([1.0])
        try:
            own.exchange([1.0])
        finally:
            done.set()

    _, error = meet(monkeypatch, goes, stays)
    assert isinstance(error, PeerError) and "does not answer" in str(error)
