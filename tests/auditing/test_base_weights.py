"""Deltas beside the weights they change, and the cache of the weights' singular vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig

from linchain_analysis import LinChainConfig
from linchain_analysis.auditing import read_adapter
from linchain_analysis.auditing.alignment import BaseComparison
from linchain_analysis.auditing.base import base_weight, load_base
from linchain_analysis.auditing.cache import cache_folder, hash_weight, leading_vectors_of
from linchain_analysis.auditing.modules import tabulate_modules
from linchain_analysis.auditing.overlap import compare_adapters
from linchain_analysis.auditing.spectra import decompose
from linchain_analysis.errors import InputError
from linchain_analysis.measures.randomized import randomized_svd


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", LinChainConfig(r=4, chain_length=2, target_modules=["q_proj", "down_proj", "embed_tokens"])),
        ("gpt2", LoraConfig(r=4, target_modules=["c_attn", "c_fc"])),
        ("vit", LoraConfig(r=4, target_modules=["projection", "q_proj"])),
    ],
)
def test_comparison_against_dense_twins(name: str, config: Any, save: Any) -> None:
    path = save(name, config, base=True)
    adapter = read_adapter(path)
    model = load_base(str(path.parent / "base"), adapter.config)
    table = tabulate_modules([adapter], measure_more=BaseComparison(model, num_vectors=8)).set_index("module")
    for chain in adapter.chains:
        base = base_weight(model, chain).double().numpy()
        delta = chain.scale * np.linalg.multi_dot(adapter.read(chain))
        assert base.shape == delta.shape
        u, sigma, vt = np.linalg.svd(base, full_matrices=False)
        du, _, dvt = np.linalg.svd(delta, full_matrices=False)
        row = table.loc[chain.module]
        rank = int(row["numerical_rank"])
        size = np.linalg.norm(delta)
        assert row["base_norm"] == pytest.approx(np.linalg.norm(base), rel=1e-6)
        assert row["relative_delta"] == pytest.approx(size / np.linalg.norm(base), rel=1e-6)
        amplified = size / np.linalg.norm(du[:, :rank].T @ base @ dvt[:rank].T)
        assert row["amplification"] == pytest.approx(amplified, rel=1e-3)
        # The randomised decomposition of a random weight, whose spectrum hardly falls, is good to a few percent.
        assert row["base_spectral_norm"] == pytest.approx(sigma[0], rel=1e-2)
        assert row["base_alignment_left"] == pytest.approx(np.linalg.norm(u[:, :8].T @ delta) / size, abs=0.1)
        assert row["base_alignment_right"] == pytest.approx(np.linalg.norm(delta @ vt[:8].T) / size, abs=0.1)
        count = min(10, *base.shape)
        changed = np.linalg.svd(base + delta, full_matrices=False)[2][:count]
        intruders = (np.abs(changed @ vt.T).max(axis=1) < 0.5).sum()
        assert row["intruders_lower"] <= intruders <= row["intruders_upper"]


def test_a_weight_is_decomposed_once(cache: Path) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    calls = []

    def compute() -> Any:
        calls.append(1)
        return randomized_svd(weight.numpy(), 5)

    first = leading_vectors_of(weight, 5, 0, compute)
    again = leading_vectors_of(weight, 5, 0, compute)
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1
    for part in ("left", "sigma", "right"):
        np.testing.assert_array_equal(getattr(first, part), getattr(again, part))
    leading_vectors_of(weight, 4, 0, lambda: randomized_svd(weight.numpy(), 4))
    leading_vectors_of(weight + 1, 5, 0, compute)
    leading_vectors_of(weight, 5, 1, compute)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_computed_again(damage: str, cache: Path) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    good = leading_vectors_of(weight, 5, 0, lambda: randomized_svd(weight.numpy(), 5))
    (entry,) = cache.iterdir()
    stored = bytearray(entry.read_bytes())
    if damage == "flipped":
        stored[-3] ^= 1
    entry.write_bytes({"cut": stored[:-20], "flipped": stored, "empty": b""}[damage])
    calls = []

    def compute() -> Any:
        calls.append(1)
        return randomized_svd(weight.numpy(), 5)

    np.testing.assert_array_equal(leading_vectors_of(weight, 5, 0, compute).left, good.left)
    leading_vectors_of(weight, 5, 0, compute)
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "file" / "below"))
    weight = torch.randn(6, 5)
    assert leading_vectors_of(weight, 2, 0, lambda: randomized_svd(weight.numpy(), 2)).sigma.shape == (2,)


def test_hash_and_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    assert hash_weight(weight) == hash_weight(weight.T.contiguous().T)
    others = [weight.T, weight.double(), weight.bfloat16(), -weight, weight.reshape(6, 4)]
    assert len({hash_weight(weight), *map(hash_weight, others)}) == 6
    monkeypatch.delenv("LINCHAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "linchain_analysis"


def test_another_base_model_is_refused(save: Any, tmp_path: Path) -> None:
    adapter = read_adapter(save("llama", LoraConfig(r=4, target_modules=["q_proj"])))
    small_models.llama(hidden_size=16).save_pretrained(tmp_path / "other")
    model = load_base(str(tmp_path / "other"), adapter.config)
    with pytest.raises(InputError, match=r"q_proj.*\(16, 16\)"):
        tabulate_modules([adapter], measure_more=BaseComparison(model))
    with pytest.raises(InputError, match=r"nowhere.*a model of transformers"):
        load_base(str(tmp_path / "nowhere"), adapter.config)


def test_low_precision_weights_are_compared(save: Any, tmp_path: Path) -> None:
    path = save("llama", LoraConfig(r=4, target_modules=["q_proj"]), base=True)
    adapter = read_adapter(path)
    load_base(str(path.parent / "base"), adapter.config, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    model = load_base(str(tmp_path / "half"), adapter.config)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    table = tabulate_modules([adapter], measure_more=BaseComparison(model))
    assert np.isfinite(table["amplification"]).all()


def test_subspaces_of_pairs(save: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    paths = [save("llama", config, seed=0), save("llama", config, seed=0, steps=5), save("llama", config, seed=1)]
    adapters = [read_adapter(path, name) for path, name in zip(paths, "abc", strict=True)]
    table = compare_adapters(adapters).set_index(["adapter_1", "adapter_2", "module", "side"])
    assert len(table) == 3 * 4 * 2
    for (one, two, module, side), row in table.iterrows():
        bases = []
        for adapter in adapters:
            if adapter.name in (one, two):
                chain = next(chain for chain in adapter.chains if chain.module == module)
                delta = np.linalg.multi_dot(adapter.read(chain))
                u, _, vt = np.linalg.svd(delta)
                bases.append((u if side == "left" else vt.T)[:, :4])
        cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
        assert row["similarity"] == pytest.approx((cosines**2).sum() / 4, abs=1e-5)
        np.testing.assert_allclose(np.cos(np.radians(row["angles"])), np.minimum(cosines, 1), atol=1e-5)
    # What one training goes on from lies nearer to it than another training does.
    near = table.loc[("a", "b"), "similarity"].mean()
    assert near > table.loc[("a", "c"), "similarity"].mean()
    same = compare_adapters([adapters[0], read_adapter(paths[0], "again")])
    assert (same["largest_angle"] < 1e-5).all() and np.allclose(same["similarity"], 1)


def test_directions_of_a_rank_deficient_delta_are_left_out() -> None:
    rng = np.random.default_rng(0)
    first, last = rng.standard_normal((9, 4)), rng.standard_normal((4, 7))
    last[2:] = 0
    found = decompose([first, last], 2.0, 2.0**-23)
    left, right = found.vectors()
    assert found.rank == 2 and left.shape == (9, 2) and right.shape == (7, 2)
    np.testing.assert_allclose(left * found.sigma[:2] @ right.T, 2 * first @ last, atol=1e-12)
