"""Measures of today on snapshots of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import small_models
import torch
from peft import get_peft_model
from small_runs import write_run
from typer.testing import CliRunner

from linchain_analysis import LinChainConfig, Tracker, load_run
from linchain_analysis.audit import app
from linchain_analysis.auditing import apply_measures, describe_run
from linchain_analysis.errors import InputError
from linchain_analysis.measures import registry


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """A tracked run with snapshots at steps 1, 3 and 5, and the dense deltas at every step."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama(), LinChainConfig(r=3, chain_length=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    deltas: list[dict[str, np.ndarray]] = []
    with Tracker(model, optimizer, folder, preset="standard", snapshot_every=2, strict=True):
        for step in range(5):
            model(**small_models.batch("llama", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            deltas.append(
                {
                    name.removeprefix("base_model.model."): _dense(layer)
                    for name, layer in model.named_modules()
                    if name.endswith("q_proj")
                }
            )
    return folder, deltas


def _dense(layer: Any) -> np.ndarray:
    chain, last = layer.lora_A["default"], layer.lora_B["default"].weight
    factors = [chain.A, chain.W1, chain.W2, last]
    stored = [factor.detach().double().numpy() for factor in reversed(factors)]
    return np.asarray(layer.scaling["default"] * np.linalg.multi_dot(stored))


def test_columns_of_every_table(run: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    path, deltas = run
    tables = apply_measures(load_run(path), ["participation_ratio", "chain_condition", "balance"])
    assert set(tables) == {"modules", "factors", "links"}
    modules, factors, links = tables["modules"], tables["factors"], tables["links"]
    assert list(modules["step"].unique()) == [1, 3, 5] and len(modules) == 6
    assert list(factors["factor"].unique()) == ["A", "W1", "W2", "B"] and len(factors) == 24
    assert list(links["link"].unique()) == ["A-W1", "W1-W2", "W2-B"] and len(links) == 18
    for row in modules.itertuples():
        sigma = np.linalg.svd(deltas[row.step - 1][row.module], compute_uv=False)[:3]
        ratio = (sigma**2).sum() ** 2 / (sigma**4).sum()
        # The deltas are those of float32 factors, whose changes the snapshot holds in float64.
        assert row.participation_ratio == pytest.approx(ratio, rel=1e-5)
        assert row.chain_condition == pytest.approx(sigma[0] / sigma[2], rel=1e-3)


def test_columns_that_are_lists(run: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    table = apply_measures(load_run(run[0]), ["order_ratios"])["modules"]
    assert all(len(ratios) == 4 for ratios in table["order_ratios"])
    assert {"step", "module", "order_ratios", "interaction_ratio"} <= set(table)


def test_what_a_run_holds(run: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    held = describe_run(load_run(run[0]))
    assert held["steps"] == 5 and held["snapshots"] == [1, 3, 5] and held["preset"] == "standard"
    assert "spectrum" in held["columns"]["modules"]
    assert len(held["last_effective_ranks"]) == 2


def test_modules_stand_in_the_order_of_the_model(run: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    found = load_run(run[0])
    order = [record.module for record in found.manifest.modules]
    table = apply_measures(found, ["conditioning"])["factors"]
    assert list(table.loc[table["step"] == 3, "module"].unique()) == order
    assert list(describe_run(found)["last_effective_ranks"]) == order


@pytest.mark.parametrize("name", ["effective_rank", "spectra", "norms", "noise", "grad_norm", "noise_scale"])
def test_what_the_tracker_records_is_no_measure(name: str, run: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    with pytest.raises(InputError, match="what the tracker records itself"):
        apply_measures(load_run(run[0]), [name])


OWN = """
import numpy as np
from linchain_analysis.measures.registry import measure, spectral_measure
from linchain_analysis.vocabulary import Column

@measure(Column("factors", "largest_entry", "float", "weight", "max |F_i|", ""))
def measure_largest(cores):
    return {"largest_entry": np.stack([abs(f).max(axis=(1, 2)) for f in cores.before], axis=1)}

@spectral_measure("σ₂/σ₁", unit="1")
def second_share(sigma):
    return sigma[..., 1] / sigma[..., 0]
"""


def test_measures_in_a_file_of_ones_own(
    run: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.all_measures()
    monkeypatch.setattr(registry, "_FOUND", dict(registry._FOUND))
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    path, deltas = run
    for _ in range(2):
        done = CliRunner().invoke(app, [str(path), "--measure", "own.py"])
        assert done.exit_code == 0, done.output
    assert Path("audit-run-own-2").is_dir()
    table = pd.read_parquet("audit-run-own/modules.parquet")
    for row in table.itertuples():
        sigma = np.linalg.svd(deltas[row.step - 1][row.module], compute_uv=False)
        assert row.second_share == pytest.approx(sigma[1] / sigma[0], rel=1e-4)
    assert len(pd.read_parquet("audit-run-own/factors.parquet")) == 24
    schema = pq.read_schema("audit-run-own/modules.parquet")
    assert schema.field("second_share").metadata[b"meaning"].decode() == "σ₂/σ₁"
    for text, word in (
        ("x = 1", "got none"),
        ("1 / 0", "ZeroDivisionError"),
        (OWN.replace("largest", "orders"), "'orders'"),
    ):
        Path("bad.py").write_text(text)
        done = CliRunner().invoke(app, [str(path), "--measure", "bad.py"])
        assert done.exit_code == 2 and word in done.stderr, done.output
    done = CliRunner().invoke(app, [str(path), "--measure", "nowhere.py"])
    assert done.exit_code == 2 and "no such file" in done.stderr


def test_wide_tables_are_split_and_words_kept(
    run: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    measures = [part for name in ("orders", "conditioning", "numerical_rank") for part in ("--measure", name)]
    done = CliRunner().invoke(app, [str(run[0]), *measures, "--out", str(tmp_path / "found")])
    assert done.exit_code == 0, done.output
    assert "modules below: model.layers.…" in done.stdout and "0.self_attn.q_proj" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("interaction", "condition", "numerical", "cosine"):
        assert f" {word}" in done.stdout


def test_a_run_without_spectra_shows_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama(), LinChainConfig(r=3, chain_length=1, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with Tracker(model, optimizer, tmp_path / "run", preset="light", strict=True):
        model(**small_models.batch("llama", seed=0)).loss.backward()
        optimizer.step()
    held = describe_run(load_run(tmp_path / "run"))
    assert "effective_rank" not in held["columns"]["modules"] and "delta_norm" in held["columns"]["modules"]
    assert not held["last_effective_ranks"] and len(held["last_delta_norms"]) == 2
    done = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert "‖ΔW‖ at the last step" in done.stdout and "effective rank" not in done.stdout


def test_a_run_without_snapshots_says_how_to_record_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    with pytest.raises(InputError, match="snapshot_every=N"):
        apply_measures(run, ["participation_ratio"])
    assert describe_run(run)["snapshots"] == []
    with pytest.raises(InputError, match="participation_ratio"):
        apply_measures(run, ["particpation_ratio"])


def test_the_door_writes_a_table_of_each_kind(run: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    measures = ("--measure", "numerical_rank", "--measure", "imbalance")
    done = CliRunner().invoke(app, [str(run[0]), *measures, "--out", str(tmp_path / "found")])
    assert done.exit_code == 0, done.output
    assert "modules, step 5 (of 3)" in done.stdout
    assert {file.name for file in (tmp_path / "found").iterdir()} == {"modules.parquet", "links.parquet"}
    written = pd.read_parquet(tmp_path / "found" / "modules.parquet")
    expected = apply_measures(load_run(run[0]), ["numerical_rank"])["modules"]
    pd.testing.assert_frame_equal(written, expected)
    done = CliRunner().invoke(app, [str(run[0]), "--measure", "numerical_rank", "--out", str(run[0])])
    assert done.exit_code == 2
