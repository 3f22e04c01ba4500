"""What is shown is what `load_run` gives, at every moment of a run's life."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_runs

from linchain_analysis.runs import ModuleRecord, RunWriter, append_evals, load_run
from linchain_analysis.runs.manifest import read_manifest, write_manifest
from linchain_analysis.runs.tail import StreamTail
from linchain_analysis.watching import intake
from linchain_analysis.watching.following import RunFollower
from linchain_analysis.watching.view import WINDOW, RunView

# Two kinds with chains of different length, of which one comes only later in the model.
FACTORS = {"q_proj": ("A", "B"), "up_proj": ("A", "W1", "W2", "B")}
MODULES = tuple(
    ModuleRecord(
        f"layers.{layer}.{kind}", kind, layer, "default", 8, 8, 2.0, tuple((name, (4, 4)) for name in FACTORS[kind])
    )
    for layer, kind in enumerate(["q_proj"] * 2 + ["up_proj", "q_proj"] * 3)
)


def write_step(writer: RunWriter, step: int, *, finished: bool = True) -> None:
    """A step with numbers that differ between modules, factors and steps, some of them missing."""
    random = np.random.default_rng(step)
    # Here and there no spectrum was taken, or delta is zero.
    spectra = [None if random.random() < 0.2 else np.sort(random.random(3))[::-1] * (place != 2) for place in range(8)]
    for part in (slice(3), slice(3, 8)):  # in two batches, so that a look in pieces may see half a step
        own = [record.module for record in MODULES[part]]
        writer.append("modules", {"step": [step] * len(own), "module": own, "spectrum": spectra[part]})
    keys = [(record.module, name) for record in MODULES for name, _ in record.factors]
    ratios = np.where(random.random(len(keys)) < 0.2, np.nan, random.random(len(keys)))
    modules, factors = zip(*keys, strict=True)
    writer.append("factors", {"step": [step] * len(keys), "module": modules, "factor": factors, "update_ratio": ratios})
    if finished:
        columns: dict[str, Any] = {
            "loss": np.nan if step == 3 else 10.0 / step,
            "learning_rate": 1e-3 / step,
            "grad_norm": random.random(),
            "clip_coef": [1.0, 0.5, np.nan][step % 3],
            "skipped": step % 4 == 0,
            "seconds": 0.1 + random.random(),
            "track_seconds": 0.01 * random.random(),
        }
        writer.append("steps", {"step": [step], **{name: [value] for name, value in columns.items()}})


def assert_shows_what_is_stored(view: RunView, path: Path) -> None:
    """Compare a view with the same computed from the frames of `load_run`."""
    run = load_run(path)
    steps, seen = run.steps, view.steps
    assert seen.num_rows == len(steps) == run.num_steps
    if not len(steps):
        return
    same = np.testing.assert_array_equal
    same(seen.losses, steps["loss"])
    recent = steps.tail(WINDOW)
    known = steps["clip_coef"].dropna()
    expected = {
        "step": steps["step"].iloc[-1],
        "loss": steps["loss"].iloc[-1],
        "learning_rate": steps["learning_rate"].iloc[-1],
        "grad_norm": steps["grad_norm"].iloc[-1],
        "clipped_share": (known < 1).mean() if len(known) else np.nan,
        "num_skipped": steps["skipped"].eq(True).sum(),
        "track_milliseconds": 1e3 * steps["track_seconds"].median(),
    }
    same([getattr(seen, name) for name in expected], list(expected.values()))
    # Sums and means of the same numbers in another order: 1e-12.
    near = {
        "loss_mean": recent["loss"].mean(),
        "steps_per_second": 1 / recent["seconds"].mean(),
        "seconds": steps["seconds"].sum(min_count=1),
        "track_share": steps["track_seconds"].sum(min_count=1) / steps["seconds"].sum(min_count=1),
    }
    np.testing.assert_allclose([getattr(seen, name) for name in near], list(near.values()), rtol=1e-12)

    modules = run.modules.dropna(subset=["effective_rank"])
    last = modules[modules["step"] == modules["step"].max()]
    same(view.rank, last["effective_rank"].median())
    by_kind = last.groupby("kind", observed=False)["effective_rank"]
    medians = modules.pivot_table("effective_rank", "step", "kind", aggfunc="median", observed=True)
    for rank in view.ranks:
        own = [by_kind.median()[rank.kind], by_kind.min()[rank.kind], by_kind.max()[rank.kind]]
        same([rank.median, rank.low, rank.high], own)
        drawn = medians[rank.kind] if rank.kind in medians else [np.nan] * len(medians)
        same(rank.medians, drawn)

    factors = run.factors[run.factors["step"] == run.factors["step"].max()]
    # What is stored is float32; the mean of the two middle ones is taken in float64.
    factors = factors.assign(update_ratio=factors["update_ratio"].astype(np.float64))
    same(view.ratio, factors["update_ratio"].median())
    ratios = factors.groupby(["kind", "factor"], observed=True)["update_ratio"].median()
    assert all(list(own) == list(FACTORS.get(kind, small_runs.FACTORS)) for kind, own in view.ratios.items())
    found = pd.Series({(kind, name): value for kind, own in view.ratios.items() for name, value in own.items()})
    assert dict(found.dropna()) == dict(ratios.dropna())

    evals = {(e.split, e.metric): (e.step, e.value) for e in view.evals}
    rows = run.evals.groupby(["split", "metric"], observed=True).last()
    assert evals == {key: (row["step"], row["value"]) for key, row in rows.iterrows()}
    health = run.read("health")
    after = max((segment.last_step for segment in run.manifest.segments), default=0)
    latest = health[health["step"] > after].drop_duplicates("finding", keep="last")
    assert {f.finding: (f.step, f.message) for f in view.findings} == {
        row["finding"]: (row["step"], row["message"]) for _, row in latest[latest["began"]].iterrows()
    }


def add_finding(writer: RunWriter, step: int, finding: str, *, began: bool = True) -> None:
    columns = {"step": step, "finding": finding, "subject": "q_proj", "began": began, "message": f"{finding} {step}"}
    writer.append("health", {name: [value] for name, value in columns.items()})


def write_life(path: Path) -> Iterator[RunWriter]:
    """The life of a run from its manifest to its end, paused at many moments."""
    writer = RunWriter(path, small_runs.manifest(num_steps=70, modules=MODULES))
    yield writer
    writer.append("evals", {"step": [0], "split": ["eval"], "metric": ["accuracy"], "value": [0.1]})
    yield writer
    for step in range(1, 61):
        writer.append("scalars", {"step": [step], "name": ["learning_rate"], "value": [0.5 * step]})
        write_step(writer, step, finished=False)
        if step % 7 == 1:
            yield writer
        columns = {"loss": [3.0 / step], "seconds": [0.1 * step], "track_seconds": [0.001], "skipped": [step == 9]}
        writer.append("steps", {"step": [step], **columns})
        if step % 5 == 0:
            writer.append("scalars", {"step": [step, step - 1], "name": ["loss"] * 2, "value": [9.0, float(step)]})
        if step % 11 == 0:
            yield writer
            writer.append("evals", {"step": [step], "split": ["eval"], "metric": ["accuracy"], "value": [step / 100]})
            add_finding(writer, step, "no_gradient", began=step % 2 == 1)
        if step == 30:
            add_finding(writer, step, "frozen")
    yield writer


@pytest.mark.parametrize("chunk", [500, 1 << 24])
def test_a_growing_run_is_shown_as_it_is_stored(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr(intake, "StreamTail", lambda *given: StreamTail(*given, chunk=chunk))
    follower = RunFollower(path, "mine")
    num_looks = 0
    for _writer in write_life(path):
        view = follower.look()
        assert view.status == ("running" if view.steps.num_rows else "starting")
        assert not view.is_over
        assert_shows_what_is_stored(view, path)
        num_looks += 1
    assert num_looks > 15
    assert view.seconds_left == pytest.approx(10 / view.steps.steps_per_second)
    assert [finding.finding for finding in view.findings] == ["no_gradient", "frozen"]
    _writer.close("failed", "it was enough")
    view = follower.look()
    assert (view.status, view.message, view.is_over) == ("failed", "it was enough", True)
    assert_shows_what_is_stored(view, path)
    append_evals(path, {"step": [60], "split": ["test"], "metric": ["accuracy"], "value": [0.75]})
    assert_shows_what_is_stored(follower.look(), path)
    assert follower.look().evals[-1].value == 0.75
    assert_shows_what_is_stored(RunFollower(path, "mine").look(), path)


@pytest.mark.parametrize("ending", ["complete", "killed"])
def test_a_resumed_run_is_shown_as_it_is_stored(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "run"
    follower = RunFollower(path, "mine")
    writer = RunWriter(path, small_runs.manifest(modules=MODULES))
    for step in range(1, 9):
        write_step(writer, step)
    add_finding(writer, 8, "frozen")
    follower.look()
    if ending == "complete":
        writer.close()
    else:
        kill(writer)
        view = follower.look()
        assert (view.status, view.message, view.is_over) == ("died", "its process is gone", True)
        assert_shows_what_is_stored(view, path)
    for first in (6, 8):
        writer = RunWriter.resume(path, small_runs.manifest(modules=MODULES), after=first - 1)
        view = follower.look()
        assert (view.status, view.steps.step, view.findings) == ("running", first - 1, ())
        for step in range(first, first + 4):
            write_step(writer, step)
            assert_shows_what_is_stored(follower.look(), path)
        add_finding(writer, step, "no_gradient")
        assert_shows_what_is_stored(follower.look(), path)
        kill(writer)
    writer = RunWriter.resume(path, small_runs.manifest(modules=MODULES), after=9)
    write_step(writer, 10)
    writer.close()
    view = follower.look()
    assert (view.status, view.steps.step) == ("complete", 10)
    assert_shows_what_is_stored(view, path)


def kill(writer: RunWriter) -> None:
    """Leave a run as a process leaves it that is killed."""
    for stream in writer._streams.values():
        stream._file.close()
    writer._lock.release()


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, small_runs.manifest(modules=MODULES))
    for step in range(1, 200):
        write_step(writer, step)
    follower = RunFollower(path, "mine")
    follower.look()
    amounts: list[int] = []
    pread = os.pread

    def count(*given: Any) -> bytes:
        data = pread(*given)
        amounts.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", count)
    follower.look()
    assert sum(amounts) == 0
    before = writer.bytes_written
    write_step(writer, 200)
    assert follower.look().steps.step == 200
    assert sum(amounts) == writer.bytes_written - before


def test_damage_is_one_line_and_is_looked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, small_runs.manifest(modules=MODULES))
    follower = RunFollower(path, "mine")
    for step in range(1, 5):
        write_step(writer, step)
    data = bytearray((path / "modules.arrows").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (path / "modules.arrows").write_bytes(data)
    view = follower.look()
    # It may be a folder that is being deleted, so that damage is no end before the second look.
    assert (view.status, view.is_over, view.steps.num_rows) == ("damaged", False, 0)
    view = follower.look()
    assert (view.status, view.is_over) == ("damaged", True)
    assert view.message is not None
    assert view.message.startswith("modules.arrows: ")
    assert "\n" not in view.message
    assert follower.look() is view
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("moslora-2", "moslora-3"))
    assert "manifest.json: a wrong checksum" in (follower.look().message or "")


def test_damage_of_a_complete_run_and_a_newer_schema(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    follower = RunFollower(tmp_path / "run", "mine")
    assert follower.look().status == "complete"
    newer = RunFollower(tmp_path / "newer", "newer")
    shutil.copytree(tmp_path / "run", tmp_path / "newer")
    (tmp_path / "run" / "steps.parquet").write_bytes(b"no table")
    assert follower.look().status == "complete"  # nothing is read again of a run that has ended
    view = RunFollower(tmp_path / "run", "mine").look()
    assert (view.status, (view.message or "")[:14]) == ("damaged", "steps.parquet:")
    manifest = read_manifest(tmp_path / "newer")
    write_manifest(tmp_path / "newer", replace(manifest, schema_version=99))
    view = newer.look()
    assert (view.status, "version 99" in (view.message or "")) == ("unreadable", True)


def test_a_run_that_vanishes_and_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    follower = RunFollower(path, "mine")
    with pytest.raises(FileNotFoundError):
        follower.look()
    writer = small_runs.write_run(path, 5, close=False)
    assert follower.look().steps.step == 5
    kill(writer)
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError):
        follower.look()
    _writer = small_runs.write_run(path, 2, close=False)
    view = follower.look()
    assert (view.status, view.steps.step) == ("running", 2)
    assert_shows_what_is_stored(view, path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_runs_of_every_schema_version(version: int) -> None:
    path = Path(__file__).parents[1] / "runs" / "data" / f"schema-{version}"
    for manifest in [path / "manifest.json"] if (path / "manifest.json").exists() else path.glob("*/manifest.json"):
        view = RunFollower(manifest.parent, "old").look()
        assert view.status in ("complete", "died", "running", "interrupted", "failed")
        assert view.steps.num_rows == load_run(manifest.parent).num_steps > 0


def test_a_run_of_a_preset_without_spectra_and_one_without_modules(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", small_runs.manifest(modules=()))
    writer.append("steps", {"step": [1, 2], "loss": [2.0, 1.0]})
    view = RunFollower(tmp_path / "run", "full").look()
    assert (view.steps.loss, view.ranks, view.ratios) == (1.0, (), {})
    assert np.isnan([view.rank, view.ratio, view.steps.seconds, view.steps.track_share, view.seconds_left]).all()


def test_what_takes_long_is_read_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr(intake, "StreamTail", lambda *given: StreamTail(*given, chunk=3000))
    *_, _writer = write_life(path)
    follower = RunFollower(path, "mine")
    seen = [follower.look(deadline=0.0)]
    while seen[-1].status == "reading":
        assert not seen[-1].is_over
        seen.append(follower.look(deadline=0.0))
    assert len(seen) > 10
    assert 0 < seen[1].steps.num_rows < 60
    assert seen[-1].status == "running"
    assert_shows_what_is_stored(follower.look(), path)


def test_modules_that_are_declared_later_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, small_runs.manifest(modules=MODULES[:2]))
    follower = RunFollower(path, "mine")
    follower.look()
    former = read_manifest(path)
    writer.update_manifest(modules=MODULES)
    write_step(writer, 1)
    stale = iter([former])  # as if they were declared right after the manifest was read
    monkeypatch.setattr(intake, "read_manifest", lambda folder: next(stale, None) or read_manifest(folder))
    assert_shows_what_is_stored(follower.look(), path)
