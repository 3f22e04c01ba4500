"""Saved adapters against PEFT's own reading of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoKrConfig, LoraConfig, MissConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from linchain_analysis import LinChainConfig
from linchain_analysis.adapters.methods import method_config
from linchain_analysis.auditing import read_adapter, read_adapters
from linchain_analysis.auditing.modules import tabulate_modules
from linchain_analysis.auditing.spectra import decompose
from linchain_analysis.errors import InputError

LLAMA = small_models.TARGETS["llama"]
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", LoraConfig(r=4, target_modules=LLAMA)),
    "gaussian": ("llama", LoraConfig(r=4, target_modules=LLAMA, init_lora_weights="gaussian")),
    "patterns": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=LLAMA,
            use_rslora=True,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "linchain": ("llama", LinChainConfig(r=4, chain_length=3, chain_width=6, target_modules=[*LLAMA, "embed_tokens"])),
    "narrow": ("llama", LinChainConfig(r=5, chain_length=2, chain_width=3, target_modules=LLAMA)),
    "moslora": ("gpt2", LinChainConfig(r=4, chain_length=1, target_modules=small_models.TARGETS["gpt2"])),
    "convolution": ("vit", LinChainConfig(r=4, chain_length=2, target_modules=["projection", "q_proj"])),
    "parameters": (
        "llama",
        LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"], alpha_pattern={"q_proj.weight": 3}),
    ),
    "wide": ("llama", LoraConfig(r=40, target_modules=["k_proj"])),
}


def _dense_deltas(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Dense delta of every layer in float64, as PEFT forms it."""
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(small_models.BUILDERS[name](), str(path)).double()
    return {
        key.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().flatten(1)
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("case", CASES)
def test_sigma_is_that_of_pefts_dense_delta(case: str, save: Any) -> None:
    name, config = CASES[case]
    path = save(name, config)
    adapter = read_adapter(path)
    dense = _dense_deltas(name, path)
    assert {chain.module for chain in adapter.chains} == set(dense)
    assert not adapter.refused and not adapter.others
    for chain in adapter.chains:
        found = decompose(adapter.read(chain), chain.scale, chain.epsilon)
        sigma = np.linalg.svd(dense[chain.module].numpy(), compute_uv=False)
        assert found.sigma.shape == (chain.rank_bound,)
        np.testing.assert_allclose(found.sigma, sigma[: chain.rank_bound], atol=1e-9 * sigma[0], rtol=0)
        left, right = found.vectors()
        u, s, vt = np.linalg.svd(dense[chain.module].numpy())
        # The same spaces: the dense delta is found again from them, in one orientation or the other.
        delta = left * found.sigma[: found.rank] @ right.T
        dense_delta = (u[:, : len(s)] * s) @ vt[: len(s)]
        stored = dense_delta if delta.shape == dense_delta.shape and np.allclose(delta, dense_delta) else dense_delta.T
        # Directions below the rounding of float32 factors are left out.
        np.testing.assert_allclose(delta, stored, atol=chain.size[0] * 1e-6 * s[0], rtol=0)


def test_measures_of_the_table_against_dense_numbers(save: Any) -> None:
    path = save("llama", CASES["linchain"][1])
    table = tabulate_modules([read_adapter(path)])
    dense = _dense_deltas("llama", path)
    for row in table.itertuples():
        sigma = np.linalg.svd(dense[row.module].numpy(), compute_uv=False)
        p = sigma[sigma > 1e-13 * sigma[0]] / sigma.sum()
        assert row.delta_norm == pytest.approx(float(torch.linalg.matrix_norm(dense[row.module])), rel=1e-9)
        assert row.delta_spectral_norm == pytest.approx(sigma[0], rel=1e-9)
        assert row.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert row.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-9)
        assert row.participation_ratio == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-9)
        cut_off = max(row.d_in, row.d_out) * np.finfo(np.float32).eps
        assert row.rank_cut_off == pytest.approx(cut_off)
        assert row.numerical_rank == (sigma > cut_off * sigma[0]).sum()
        assert row.chain_condition == pytest.approx(sigma[0] / sigma[row.rank_bound - 1], rel=1e-6)
    assert table["layer"].isna().sum() == 1  # the embedding
    assert list(table["kind"].unique()) == ["embed_tokens", "down_proj", "up_proj", "k_proj", "q_proj", "v_proj"]


def test_unused_and_nearly_unused_and_broken_modules(save: Any, tmp_path: Path) -> None:
    source = save("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"]))
    shutil.copytree(source, tmp_path / "a")
    tensors = load_file(source / "adapter_model.safetensors")
    base = "base_model.model.model.layers.0.self_attn"
    tensors[f"{base}.q_proj.lora_B.weight"].zero_()
    tensors[f"{base}.v_proj.lora_B.weight"].mul_(1e-5)
    tensors[f"{base}.k_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    table = tabulate_modules([read_adapter(tmp_path / "a")]).set_index("module")
    states = {name.removeprefix("model.layers."): state for name, state in table["state"].items()}
    assert states["0.self_attn.q_proj"] == "unused"
    assert states["0.self_attn.v_proj"] == "nearly unused"
    assert states["0.self_attn.k_proj"] == "not finite"
    assert all(state == "used" for name, state in states.items() if name.startswith("1."))
    zero, broken = table.loc["model.layers.0.self_attn.q_proj"], table.loc["model.layers.0.self_attn.k_proj"]
    assert zero["delta_norm"] == 0 and np.isnan(zero["effective_rank"])
    assert np.isnan(broken["delta_norm"]) and np.isnan(broken["spectrum"]).all()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), "DoRA"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "PiSSA"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_2"), "PiSSA"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"), "OLoRA"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"), "orthogonal"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "random factors"),
    ],
)
def test_what_is_no_delta_is_called_the_product(config: Any, word: str, save: Any) -> None:
    adapter = read_adapter(save("llama", config))
    assert adapter.refused is not None and word in adapter.refused
    table = tabulate_modules([adapter])
    assert (table["state"] == "refused").all()
    assert table["spectrum"].isna().all() and table["effective_rank"].isna().all() and table["delta_norm"].isna().all()
    assert all(len(product) == 4 for product in table["product_spectrum"])


@pytest.mark.parametrize("name", ["corda", "lora_ga", "loftq", "an_init_of_tomorrow"])
def test_other_starts_are_refused_by_name(name: str, save: Any, tmp_path: Path) -> None:
    shutil.copytree(save("llama", LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "a")
    _change_config(tmp_path / "a", init_lora_weights=name)
    titles = {"corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
    assert titles.get(name, "an_init_of_tomorrow") in str(read_adapter(tmp_path / "a").refused)


def test_a_converted_start_is_a_delta(save: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_models.llama()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT's documentation of the conversion asks
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    after = layer.base_layer.weight + layer.get_delta_weight("default")
    adapted.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = read_adapter(tmp_path / "a")
    assert adapter.refused is None
    chain = next(chain for chain in adapter.chains if chain.layer == 0)
    sigma = decompose(adapter.read(chain), chain.scale, chain.epsilon).sigma
    dense = np.linalg.svd((after - before).detach().double().numpy(), compute_uv=False)
    assert chain.rank_bound == 8
    # W_0 and the residual of PiSSA are float32.
    np.testing.assert_allclose(sigma, dense[:8], atol=1e-4 * dense[0])


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoKrConfig(r=4, target_modules=["q_proj"]), "LoKr"),
        (VeraConfig(r=4, target_modules=["q_proj"]), "VeRA"),
        (MissConfig(r=4, target_modules=["q_proj"]), "MISS"),
    ],
)
def test_other_methods_are_refused_by_name(config: Any, word: str, save: Any) -> None:
    adapter = read_adapter(save("llama", config, steps=0))
    assert adapter.chains == () and word in str(adapter.refused)
    assert tabulate_modules([adapter]).empty


def test_what_changed_beyond_the_adapter_is_said(save: Any) -> None:
    more = read_adapter(save("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    assert any("whole modules" in change and "lm_head" in change for change in more.others)
    biased = read_adapter(save("opt", LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only")))
    assert any(change.startswith("biases") for change in biased.others)
    inner = read_adapter(save("opt", LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)))
    assert any("biases of the factors" in change for change in inner.others)
    tokens = read_adapter(save("llama", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])))
    assert any("rows of embeddings" in change for change in tokens.others)


def test_a_pickle_is_refused_and_never_opened(save: Any, tmp_path: Path) -> None:
    shutil.copytree(save("llama", LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match="weights_only=True"):
        read_adapter(tmp_path / "a")


def test_files_that_do_not_belong_together(save: Any, tmp_path: Path) -> None:
    shutil.copytree(save("llama", LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "a")
    _change_config(tmp_path / "a", r=8)
    with pytest.raises(InputError, match="factors of rank 8"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="a safetensors file"):
        read_adapter(tmp_path / "a")


def test_modules_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)))
    get_peft_model(model, LoraConfig(r=2, target_modules=r"\d+")).save_pretrained(tmp_path)
    assert [chain.module for chain in read_adapter(tmp_path).chains] == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "name", ["lora-4", "moslora-4", "linchain-3-4", "linchain-2-8", "linchain-2-8-w8", "linchain-3-4-w6-he"]
)
def test_methods_have_the_names_they_are_made_by(name: str, save: Any) -> None:
    assert read_adapter(save("llama", method_config(name, ["q_proj"]), steps=0)).method == name


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 3, groups=2)
            self.plain = torch.nn.Linear(4, 4)

    get_peft_model(Grouped(), LoraConfig(r=4, target_modules=["conv", "plain"])).save_pretrained(tmp_path)
    refused = {chain.module: chain.refused for chain in read_adapter(tmp_path).chains}
    assert "2 groups" in str(refused["conv"]) and refused["plain"] is None


def test_checkpoints_are_found_in_their_order(save: Any, tmp_path: Path) -> None:
    source = save("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    for step in (1000, 200, 50):
        shutil.copytree(source, tmp_path / "run" / f"checkpoint-{step}")
    names = [adapter.name for adapter in read_adapters([tmp_path / "run"])]
    assert names == ["checkpoint-50", "checkpoint-200", "checkpoint-1000"]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    both = read_adapters([tmp_path / "run", tmp_path / "other", tmp_path / "run" / "checkpoint-50"])
    assert len({adapter.name for adapter in both}) == 6
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        read_adapters([tmp_path / "nothing"])


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
