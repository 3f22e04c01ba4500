"""The folded, fused forward against applying the factors one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from adapters.single_layers import close, gradients, one_by_one
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from linchain_analysis.adapters import LinChainConfig, fold_to_lora
from linchain_analysis.adapters.layer import ChainLinear


def adapted(
    d_in: int, d_out: int, dtype: torch.dtype = torch.float64, bias: bool = True, **options: object
) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    return get_peft_model(base, LinChainConfig(r=4, target_modules=["0"], **options), autocast_adapter_dtype=False)


@settings(deadline=None, max_examples=40)
@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    length=st.integers(0, 5),
    width=st.integers(1, 7),
    rslora=st.booleans(),
    bias=st.booleans(),
    leading=st.lists(st.integers(0, 3), max_size=3),
)
def test_equals_factor_by_factor(
    d_in: int, d_out: int, length: int, width: int, rslora: bool, bias: bool, leading: list[int]
) -> None:
    options = {"chain_length": length, "chain_width": width if length > 1 else None, "use_rslora": rslora}
    model = adapted(d_in, d_out, bias=bias, lora_alpha=3, **options)
    layer = model.base_model.model[0]
    assert isinstance(layer, ChainLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(*leading, d_in, dtype=torch.float64, requires_grad=True)
    output, expected = layer(x), one_by_one(layer, x)
    close(output, expected)
    close(gradients(output, x, layer), gradients(expected, x, layer))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_follow_lora(base_dtype: torch.dtype, adapter_dtype: torch.dtype, autocast: bool) -> None:
    model = adapted(6, 5, torch.float32)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    lora = fold_to_lora(model).base_model.model[0]
    for each in (layer, lora):
        each.base_layer.to(base_dtype)
        each.lora_A.to(adapter_dtype)
        each.lora_B.to(adapter_dtype)
    x = torch.randn(7, 6).to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = layer(x), lora(x)
    assert got.dtype == expected.dtype
    # Products are rounded in another order, by at most a few units of the shortest type that takes part.
    shortest = max(torch.finfo(t).eps for t in (base_dtype, adapter_dtype, torch.bfloat16 if autocast else base_dtype))
    torch.testing.assert_close(got, expected, rtol=0, atol=8 * shortest * float(expected.abs().max()))


def test_chain_is_multiplied_in_full_precision_under_autocast() -> None:
    layer = adapted(6, 5, torch.float32).base_model.model[0]
    chain = layer.lora_A["default"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = chain.weight
    assert inside.dtype == torch.float32
    assert torch.equal(inside, chain.weight)


def test_hooks_on_the_factors_still_run() -> None:
    layer = adapted(6, 5).base_model.model[0]
    x = torch.randn(3, 6, dtype=torch.float64)
    fused, seen = layer(x), []
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), fused, rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype: torch.dtype) -> None:
    layer = adapted(6, 5, torch.float32).base_model.model[0]
    layer.base_layer.to(dtype)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 6, dtype=dtype)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(build: Callable, cases: dict, use_reentrant: bool) -> None:
    case = cases["llama"]
    gradients = []
    for checkpointing in (False, True):
        model = build(case)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        config = LinChainConfig(r=4, target_modules=case.targets, init_lora_weights=False)
        model = get_peft_model(model, config).train()
        F.cross_entropy(case.run(model).flatten(0, 1), torch.arange(10)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, checkpointed)


def test_empty_batch() -> None:
    layer = adapted(6, 5, torch.float32).base_model.model[0]
    out = layer(torch.randn(0, 3, 6))
    assert out.shape == (0, 3, 5)
    out.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in layer.parameters() if p.requires_grad)


def test_options_that_are_none_do_not_reach_the_base_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LinChainConfig(r=2, target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    torch.testing.assert_close(layer(x, adapter_names=None, alora_offsets=None), layer(x), rtol=0, atol=0)
