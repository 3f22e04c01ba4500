"""What PEFT does with adapters, done with chains on every kind of model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer, ParamWrapper, _ConvNd
from peft.tuners.lora.layer import MultiheadAttention as LoraAttention
from safetensors.torch import load_file
from torch import Tensor, nn

from linchain_analysis.adapters import LinChainConfig, fold_to_lora, read_factors

WIDE = {"r": 4, "chain_length": 2, "chain_width": 6}


def chain_config(case, **options: object) -> LinChainConfig:
    return LinChainConfig(**{**WIDE, "target_modules": case.targets, **options})


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to rounding in float32, where ten products of matrices of at most 24 columns follow one another."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * max(scale, 1.0))


def dense_delta(layer: LoraLayer, adapter: str) -> Tensor:
    """scale · A W1 … Wn B in float64, shape (d_in, d_out); a convolution's input side is channels × kernel."""
    product = None
    for _, factor, transposed in read_factors(layer, adapter):
        matrix = factor.detach().double().flatten(1)
        matrix = matrix.t() if transposed else matrix
        product = matrix if product is None else product @ matrix
    return layer.scaling[adapter] * product


def test_delta_is_the_product_of_the_factors(case, build: Callable, stir: Callable, layers_of: Callable) -> None:
    model = get_peft_model(build(case), chain_config(case, use_rslora=True))
    stir(model)
    for layer in layers_of(model):
        got = layer.get_delta_weight("default").detach().double()
        if isinstance(layer, _ConvNd) or not (
            getattr(layer, "fan_in_fan_out", False) or "default" in layer.lora_embedding_A
        ):
            got = got.flatten(1).t()  # stored (out, in, *kernel)
        expected = dense_delta(layer, "default")
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_every_factor_trains_and_the_loss_falls(case, build: Callable) -> None:
    model = get_peft_model(build(case), chain_config(case))
    model.train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        logits = case.run(model).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        if "lora_" in name:
            assert not torch.equal(parameter, start[name]), name
        else:  # PEFT merges and unmerges attention weights in each forward, which rounds them
            torch.testing.assert_close(parameter, start[name], rtol=0, atol=1e-6)


def test_save_and_load_under_another_name(case, build: Callable, stir: Callable, tmp_path: Path) -> None:
    model = get_peft_model(build(case), chain_config(case))
    stir(model)
    expected = case.run(model)
    model.save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(os.listdir(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in saved if "default" in key]
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(build(case), tmp_path, adapter_name="other", **options)
        assert isinstance(loaded.peft_config["other"], LinChainConfig)
        assert torch.equal(case.run(loaded), expected)
        loaded.load_adapter(tmp_path, adapter_name="third", **options)
        loaded.set_adapter("third")
        assert torch.equal(case.run(loaded), expected)
        assert not [name for name, p in loaded.named_parameters() if p.is_meta]


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_and_unload(case, build: Callable, stir: Callable, safe_merge: bool) -> None:
    base = case.run(build(case))
    model = get_peft_model(build(case), chain_config(case))
    stir(model)
    expected = case.run(model)
    assert not torch.allclose(expected, base, atol=1e-3)
    model.merge_adapter(safe_merge=safe_merge)
    close(case.run(model), expected)
    model.unmerge_adapter()
    close(case.run(model), expected)
    with model.disable_adapter():
        close(case.run(model), base)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    close(case.run(merged), expected)
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]


def test_several_adapters(case, build: Callable, stir: Callable) -> None:
    base = case.run(build(case))
    model = get_peft_model(build(case), chain_config(case), adapter_name="one")
    model.add_adapter("two", chain_config(case, chain_length=3, chain_width=None, chain_init="orthogonal"))
    model.add_adapter("three", chain_config(case, chain_length=0, chain_width=None))
    stir(model)
    outputs = {}
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        outputs[name] = case.run(model)
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-4)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name} <= {
        "three"
    }
    if not any(isinstance(module, LoraAttention) for module in model.modules()):  # LoRA refuses it there
        model.base_model.set_adapter(["one", "two", "three"])
        together = case.run(model)
        model.merge_adapter()
        close(case.run(model), together)
        model.unmerge_adapter()
    model.delete_adapter("two")
    assert not [name for name, _ in model.named_parameters() if ".two" in name]
    model.set_adapter("one")
    close(case.run(model), outputs["one"])
    with model.disable_adapter():
        close(case.run(model), base)


def test_state_dict_round_trip(case, build: Callable, stir: Callable) -> None:
    model = get_peft_model(build(case), chain_config(case))
    stir(model)
    state = get_peft_model_state_dict(model)
    other = get_peft_model(build(case), chain_config(case))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(case.run(other), case.run(model))


def test_mixed_adapter_batch(build: Callable, cases: dict, stir: Callable) -> None:
    case = cases["llama"]  # linear layers and an embedding
    model = get_peft_model(build(case), chain_config(case), adapter_name="one")
    model.add_adapter("two", chain_config(case, chain_length=4))
    stir(model)
    model.eval()
    ids = torch.tensor([[5, 7, 11], [3, 1, 4], [8, 8, 8]])
    names = ["two", "__base__", "one"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids[row : row + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits
        close(mixed[row], alone[0])
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=ids, adapter_names=["nobody", "one", "two"])


COMBINATIONS = [
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapter_is_loras_of_the_folded_adapters(
    build: Callable, cases: dict, stir: Callable, layers_of: Callable, combination: str
) -> None:
    case = cases["llama"]
    model = get_peft_model(build(case), chain_config(case), adapter_name="one")
    model.add_adapter("two", chain_config(case, lora_alpha=3))
    stir(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = fold_to_lora(model, "one")
    twin.add_adapter("two", fold_to_lora(model, "two").peft_config["two"])
    set_peft_model_state_dict(twin, get_peft_model_state_dict(fold_to_lora(model, "two"), adapter_name="two"), "two")
    for each in (model, twin):
        torch.manual_seed(0)
        each.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mix", combination_type=combination, density=0.5)
    assert model.peft_config["mix"].chain_length == 0
    assert model.peft_config["one"].chain_length == 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    for ours, theirs in zip(layers_of(model), layers_of(twin), strict=True):
        close(ours.get_delta_weight("mix"), theirs.get_delta_weight("mix"))
        if combination == "cat":
            exact = 0.7 * ours.get_delta_weight("one") - 0.4 * ours.get_delta_weight("two")
            close(ours.get_delta_weight("mix"), exact)
    model.set_adapter("mix")
    twin.set_adapter("mix")
    close(case.run(model), case.run(twin))


def test_weighted_adapter_is_saved_and_loaded(build: Callable, cases: dict, stir: Callable, tmp_path: Path) -> None:
    case = cases["llama"]
    model = get_peft_model(build(case), chain_config(case), adapter_name="one")
    stir(model)
    model.add_weighted_adapter(["one"], [0.5], "weaker")
    model.set_adapter("weaker")
    expected = case.run(model)
    model.save_pretrained(tmp_path, selected_adapters=["weaker"])
    assert torch.equal(case.run(PeftModel.from_pretrained(build(case), tmp_path / "weaker")), expected)


def test_options_of_lora_keep_their_meaning(build: Callable, cases: dict, layers_of: Callable) -> None:
    case = cases["llama"]
    options = {
        "target_modules": "all-linear",
        "exclude_modules": ["v_proj", "o_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 7},
        "modules_to_save": ["lm_head"],
        "lora_dropout": 0.25,
    }
    chain = get_peft_model(build(case), LinChainConfig(r=4, **options))
    lora = get_peft_model(build(case), LoraConfig(r=4, **options))
    described = [
        [
            (layer.in_features, layer.out_features, layer.r, layer.scaling, str(layer.lora_dropout))
            for layer in layers_of(m)
        ]
        for m in (chain, lora)
    ]
    assert described[0] == described[1]
    assert len(described[0]) == 10
    trained = {name for name, p in chain.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.lm_head.modules_to_save.default.weight"}
    some = LinChainConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])
    assert len(layers_of(get_peft_model(build(case), some))) == 1


def test_lora_bias(stir: Callable) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 4)), LinChainConfig(r=2, target_modules=["0"], lora_bias=True, lora_alpha=6)
    )
    stir(model)
    layer, x = model.base_model.model[0], torch.randn(3, 5)
    expected = layer.base_layer(x) + x @ dense_delta(layer, "default").float() + 3.0 * layer.lora_B["default"].bias
    close(model(x), expected)
    close(model.merge_and_unload()(x), expected)


class TwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 5))
        self.second = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first.t() @ self.second.t()


def test_target_parameters(stir: Callable, tmp_path: Path) -> None:
    def build_base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(TwoParameters())

    config = LinChainConfig(r=2, target_modules=[], target_parameters=["0.first", "0.second"])
    model = get_peft_model(build_base(), copy.deepcopy(config))
    model.add_adapter("other", copy.deepcopy(config))
    stir(model)
    base, x = build_base()[0], torch.randn(3, 5, requires_grad=True)
    wrappers = {module.parameter_name: module for module in model.modules() if isinstance(module, ParamWrapper)}
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        first = base.first.t() + dense_delta(wrappers["first"], name).float()
        second = base.second.t() + dense_delta(wrappers["second"], name).float()
        outputs[name] = model(x)
        close(outputs[name], x @ first @ second)
        model.zero_grad()
        outputs[name].sum().backward()
        trained = [p for n, p in model.named_parameters() if "lora_" in n and f".{name}." in n]
        assert len(trained) == 2 * 5
        assert all(p.grad is not None and p.grad.any() for p in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_base(), tmp_path / "other")
    close(loaded(x), outputs["other"])
    close(fold_to_lora(model, "other")(x), outputs["other"])
    close(model.merge_and_unload()(x), outputs["other"])


def test_half_precision_base_has_float32_factors(build: Callable, cases: dict) -> None:
    case = cases["llama"]
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(build(case).to(dtype), chain_config(case))
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        output = case.run(model)
        assert output.dtype == dtype
        output.float().sum().backward()
        kept = get_peft_model(build(case).to(dtype), chain_config(case), autocast_adapter_dtype=False)
        assert {p.dtype for n, p in kept.named_parameters() if "lora_" in n} == {dtype}
        assert torch.isfinite(case.run(kept)).all()


def test_injection_and_transformers_adapters(build: Callable, cases: dict, stir: Callable, tmp_path: Path) -> None:
    case = cases["llama"]
    injected = inject_adapter_in_model(chain_config(case), build(case))
    assert any(".lora_A.default.W2" in name for name, _ in injected.named_parameters())
    model = build(case)
    base = case.run(model)
    model.add_adapter(chain_config(case), adapter_name="one")
    stir(model)
    expected = case.run(model)
    model.save_pretrained(tmp_path)
    other = build(case)
    other.load_adapter(str(tmp_path), adapter_name="two")
    close(case.run(other), expected)
    other.disable_adapters()
    assert torch.equal(case.run(other), base)
    other.enable_adapters()
    folded = fold_to_lora(model)
    assert type(folded.peft_config["one"]) is LoraConfig
    close(case.run(folded), expected)
    other.delete_adapter("two")
    assert torch.equal(case.run(other), base)


def test_tied_head_shares_the_embeddings_factors(build: Callable, stir: Callable, cases: dict) -> None:
    from transformers import LlamaForCausalLM

    config = build(cases["llama"]).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(LlamaForCausalLM(config), LinChainConfig(**WIDE, **options))
    stir(model)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    deltas = embedding.get_delta_weight("default"), head.get_delta_weight("default")
    assert deltas[0].abs().max() > 1e-2
    close(deltas[1], deltas[0])


class Packed(nn.Module):
    """A stand-in for a quantised linear layer: no subclass of `nn.Linear`, weights in eight bits."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        weight = torch.randn(d_out, d_in)
        self.step = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.step)


class PackedLora(nn.Module, LoraLayer):
    """A layer as PEFT's quantised backends write theirs: it knows nothing of chains."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for name in self.active_adapters:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            hidden = lora_A(self.lora_dropout[name](x.to(lora_A.weight.dtype)))
            result = result + lora_B(hidden) * self.scaling[name]
        return result


def test_layers_of_quantised_backends(stir: Callable) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Packed(6, 5))
    config = LinChainConfig(**WIDE, target_modules=["0"])
    config._register_custom_module({Packed: PackedLora})
    model = get_peft_model(copy.deepcopy(base), config)
    stir(model)
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    assert type(layer) is PackedLora
    expected = base(x) + x @ dense_delta(layer, "default").float()
    close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), LinChainConfig(**WIDE, target_modules=["0"]))
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter without gradient would be reported in the second step
            parallel(torch.randn(3, 5)).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
