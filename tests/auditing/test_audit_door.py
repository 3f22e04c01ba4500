"""The door `python -m linchain_analysis.audit`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from small_runs import write_run
from typer.testing import CliRunner, Result

from linchain_analysis import LinChainConfig
from linchain_analysis.audit import app
from linchain_analysis.auditing import name_folder
from linchain_analysis.measures.registry import BUILT_IN, NOISE_COLUMNS, all_measures
from linchain_analysis.problems.loading import BUILTIN_MODEL
from linchain_analysis.problems.models import load_model, load_tokenizer

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"
BOTH = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def _audit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_adapter(save: Any, tmp_path: Path) -> None:
    path = save("llama", LinChainConfig(r=4, chain_length=2, target_modules=["q_proj", "v_proj"]))
    before = {file: file.read_bytes() for file in path.iterdir()}
    done = _audit(path)
    assert done.exit_code == 0, done.output
    title = f"{path.parent.name}/adapter"
    assert "linchain-2-4" in done.stdout and title in done.stdout and "0.self_attn.q_proj" in done.stdout
    folder = tmp_path / f"audit-{path.parent.name}-adapter"
    table = pd.read_parquet(folder / "audit.parquet")
    assert len(table) == 4 and (table["state"] == "used").all()
    assert all(len(sigma) == 4 for sigma in table["spectrum"]) and (table["chain_length"] == 2).all()
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    schema = pq.read_schema(folder / "audit.parquet")
    for name in ("state", "spectrum", "effective_rank", "participation_ratio", "rank_cut_off"):
        assert schema.field(name).metadata[b"meaning"]


def test_json(save: Any) -> None:
    path = save("llama", BOTH)
    done = _audit(path, "--json")
    found = json.loads(done.stdout)
    assert found["adapters"][0]["type"] == "LORA" and found["adapters"][0]["method"] == "lora-4"
    assert len(found["modules"]) == 4
    assert len(found["modules"][0]["spectrum"]) == 4 and found["modules"][0]["product_spectrum"] is None
    assert found == json.loads(Path(f"audit-{path.parent.name}-adapter/audit.json").read_text())


def test_several_adapters_are_compared(save: Any, tmp_path: Path) -> None:
    for step, seed in ((10, 0), (20, 1)):
        shutil.copytree(save("llama", BOTH, seed=seed), tmp_path / "all" / f"checkpoint-{step}")
    done = _audit(tmp_path / "all", "--out", "found")
    assert done.exit_code == 0, done.output
    assert "checkpoint-10 and checkpoint-20" in done.stdout
    overlaps = pd.read_parquet("found/overlaps.parquet")
    assert len(overlaps) == 4 * 2 and set(overlaps["side"]) == {"left", "right"}
    assert ((overlaps["similarity"] >= 0) & (overlaps["similarity"] <= 1)).all()


def test_refusals_are_said_and_shown(save: Any) -> None:
    done = _audit(save("llama", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")))
    assert done.exit_code == 1
    assert "PiSSA" in done.stdout and "NOT delta" in done.stdout and "σ of delta" not in done.stdout
    done = _audit(save("llama", LoHaConfig(r=4, target_modules=["q_proj"]), steps=0))
    assert done.exit_code == 1 and "LoHa is not a product" in done.stdout
    done = _audit(save("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    assert done.exit_code == 0 and "more changed than the adapter" in done.stdout


def test_wrong_commands(save: Any, tmp_path: Path) -> None:
    path = save("llama", BOTH)
    (tmp_path / "data.txt").write_text("text\n")
    (tmp_path / "models").mkdir()
    for arguments, word in (
        ((), "a path, or --list"),
        (("nowhere",), "no such folder"),
        ((path, "--out", path), "the adapter's own"),
        ((path, "--data", "x.json"), "--model beside it"),
        ((path, "--sharpness"), "no data"),
        ((path, "--measure", "balance"), "a run folder"),
        ((path, "--model", "m", "--top", "0"), "at least 1"),
        ((path, "--keep", "1.5"), "at most 1"),
        ((path, "--model", "m", "--data", "x.json"), "no such file"),
        ((path, "--model", "m", "--data", "models"), "a folder"),
        ((path, "--model", "./nowhere", "--data", "data.txt"), "no such folder"),
        ((path, "--model", "models/nowhere"), "no such folder"),
        ((path, "--model", "a/b/c"), "no such folder"),
    ):
        done = _audit(*arguments)
        assert done.exit_code == 2 and word in done.stderr, (arguments, done.output)
        assert "loading" not in done.stderr


def test_every_measure_is_listed() -> None:
    done = _audit("--list", "--json")
    listed = {(entry["measure"], entry["name"]) for entry in json.loads(done.stdout)}
    expected = {(name, column.name) for name, found in all_measures().items() for column in found.columns}
    expected |= {(group, name) for group, names in BUILT_IN.items() for name in names}
    expected |= {("noise", column.name) for column in NOISE_COLUMNS}
    assert listed == expected
    shown = _audit("--list").stdout
    assert all(f"{name} (" in shown for name in all_measures())
    assert shown.startswith("norms (recorded by the tracker)")
    assert all(f"{name} (recorded by the tracker)" in shown for name in (*BUILT_IN, "noise"))


def test_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    done = _audit(tmp_path / "run")
    assert done.exit_code == 0 and "moslora-2" in done.stdout and "effective rank at the last step" in done.stdout
    done = _audit(tmp_path / "run", "--measure", "participation_ratio")
    assert done.exit_code == 2 and 'preset="full"' in done.stderr
    assert "problem" not in _audit(tmp_path / "run").stdout
    done = _audit(tmp_path / "run", "--model", "m")
    assert done.exit_code == 2 and "an adapter" in done.stderr


def test_no_audit_overwrites_an_earlier_one(save: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(save("llama", BOTH), tmp_path / name / "adapter")
        assert _audit(tmp_path / name / "adapter").exit_code == 0
    done = _audit(tmp_path / "two" / "adapter")
    assert "audit-two-adapter exists already: writing to audit-two-adapter-2" in done.stderr
    assert {"audit-one-adapter", "audit-two-adapter", "audit-two-adapter-2"} <= {f.name for f in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("path", "measures", "name"),
    [
        ("runs/full", (), "audit-full"),
        ("runs/full", ("orders", "mine/own.py"), "audit-full-orders-own"),
        ("lora-8/checkpoint-20", (), "audit-lora-8-checkpoint-20"),
        ("lora-8", (), "audit-lora-8"),
    ],
)
def test_the_folder_says_what_is_in_it(path: str, measures: tuple[str, ...], name: str) -> None:
    assert name_folder(Path(path), measures) == Path(name)


def _train(model_name: str, folder: Path, records: list[dict[str, str]]) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model_name)
    config = LinChainConfig(r=4, chain_length=1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(model_name), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(8):
        for record in records:
            ids = torch.tensor([tokenizer(f"{record['instruction']}\n{record['output']}").input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


@pytest.mark.parametrize(
    "model",
    [pytest.param(BUILTIN_MODEL, id="builtin", marks=pytest.mark.slow), pytest.param(STORIES, id="stories260k")],
)
def test_everything_about_a_real_model(model: Path, tmp_path: Path) -> None:
    if not model.is_dir():
        pytest.skip(f"{model} is not here")
    records = [{"instruction": f"{a} + 3 =", "output": f"{a + 4}"} for a in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    _train(str(model), tmp_path, records)
    done = _audit(
        *(tmp_path / "adapter", "--model", model, "--data", "data.json", "--template", "plain", "--sharpness"),
        *("--learning-rate", "5e-3", "--optimizer-state", tmp_path / "optimizer.pt", "--out", "found"),
    )
    assert done.exit_code == 0, done.output
    assert "functional rank" in done.stdout and "do not compare it between chain lengths" in done.stdout
    found = json.loads(Path("found/audit.json").read_text())
    rank, sharpness = *found["functional_ranks"].values(), *found["sharpness"].values()
    assert rank["gain"] > 0 and 1 <= rank["rank"] <= 4 and len(rank["losses"]) == rank["rank"] + 1
    assert sharpness["raw"] > 0 and sharpness["preconditioned"] > 0
    assert sharpness["gradient_descent_edge"] == pytest.approx(400)
    assert sharpness["adam_edge"] == pytest.approx(7600)
    table = pd.read_parquet("found/audit.parquet")
    for name in ("base_alignment_left", "base_alignment_right"):
        assert ((table[name] >= 0) & (table[name] <= 1 + 1e-6)).all()
    assert (table["intruders_lower"] <= table["intruders_upper"]).all() and np.isfinite(table["amplification"]).all()
    assert len(list((tmp_path / "cache").iterdir())) == len(table)
