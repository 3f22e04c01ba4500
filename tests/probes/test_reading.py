"""What is read of a live model, against the dense weight change of a float64 copy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from linchain_analysis import method_config
from linchain_analysis.probes import ChainReader, find_chains

METHODS = ["linchain-3-8", "linchain-2-8", "moslora-4", "lora-8", "rslora"]


def adapt(name: str, method: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(1)
    targets = small_models.TARGETS[name]
    if method == "rslora":
        config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=targets, **overrides)
    else:
        config = method_config(method, target_modules=targets, **overrides)
    return get_peft_model(small_models.BUILDERS[name](), config)


def dense_deltas(model: nn.Module, adapter: str = "default") -> dict[str, np.ndarray]:
    """s · A W1 … B of each layer, multiplied out in float64 by PEFT's own `get_delta_weight`."""
    wide = copy.deepcopy(model).double()
    return {
        name: layer.get_delta_weight(adapter).detach().flatten(1).numpy()
        for name, layer in wide.named_modules()
        if hasattr(layer, "get_delta_weight") and layer.r
    }


def train_and_read(
    model: nn.Module, name: str, steps: int = 3, lr: float = 1e-2
) -> tuple[list[Any], Any, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Train `steps` steps; return the chains, the last reading, and dense deltas at start, before and after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    chains = find_chains(model, optimizer)
    reader = ChainReader(chains)
    reader.keep_start()
    start = dense_deltas(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(**small_models.batch(name, seed=step)).loss.backward()
        before = dense_deltas(model)
        reader.read_gradients()
        reader.read_before()
        optimizer.step()
        reading, _ = reader.read_after()
    return chains, reading, start, before, dense_deltas(model)


def assert_same_spectrum(measured: np.ndarray, dense: np.ndarray, tolerance: float = 1e-9) -> None:
    expected = np.linalg.svd(dense, compute_uv=False)
    length = len(measured)
    # Factors are float32 numbers but all arithmetic is float64: 1e-9 is far below the 2e-5 that float32 would need.
    np.testing.assert_allclose(measured, expected[:length], rtol=0, atol=tolerance * expected[0])
    assert expected[length:].max(initial=0.0) <= tolerance * expected[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", small_models.BUILDERS)
def test_delta_and_its_update_equal_the_dense_ones(name: str, method: str) -> None:
    model = adapt(name, method)
    chains, reading, start, before, after = train_and_read(model, name)
    assert len(chains) == len(after) > 0
    for i, (full_name, delta) in enumerate(after.items()):
        assert full_name.endswith(chains[i].module)
        assert_same_spectrum(reading.delta_spectrum[i], delta - start[full_name])
        assert_same_spectrum(reading.delta_update_spectrum[i], delta - before[full_name])
        assert reading.delta_norm[i] == pytest.approx(np.linalg.norm(delta - start[full_name]), rel=1e-9)
        assert reading.delta_update_norm[i] == pytest.approx(np.linalg.norm(delta - before[full_name]), rel=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_delta_is_the_change_since_the_start_where_the_first_product_is_not_zero(init: str) -> None:
    model = adapt("llama", "lora-8", init_lora_weights=init)
    _, reading, start, _, after = train_and_read(model, "llama")
    assert max(np.abs(delta).max() for delta in start.values()) > 0
    for i, (name, delta) in enumerate(after.items()):
        # The first steps of Adam leave changes whose columns all but agree, as 1 : 1e-8: what a Gram matrix in float64
        # resolves is √ε = 1.5e-8 of the largest.
        assert_same_spectrum(reading.delta_spectrum[i], delta - start[name], 1.5e-8)


def test_a_small_step_keeps_its_digits() -> None:
    model = adapt("llama", "linchain-3-8")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    # A float32 weight near 0.1 resolves relative steps of about 1e-7; the steps here are about 1e-5.
    _, reading, _, before, after = train_and_read(model, "llama", steps=1, lr=1e-6)
    for i, name in enumerate(after):
        assert_same_spectrum(reading.delta_update_spectrum[i], after[name] - before[name])


def test_factor_norms_and_cosines_equal_those_computed_one_by_one() -> None:
    model = adapt("gpt2", "linchain-3-8")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    chains = find_chains(model, optimizer)
    reader = ChainReader(chains)
    previous: dict[int, torch.Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        model(**small_models.batch("gpt2", seed=step)).loss.backward()
        gradients = {id(p): p.grad.double().clone() for p in model.parameters() if p.grad is not None}
        old = {id(p): p.detach().double().clone() for p in model.parameters()}
        reader.read_gradients()
        reader.read_before()
        optimizer.step()
        reading, _ = reader.read_after()
        for c, chain in enumerate(chains):
            along = total_g = total_d = 0.0
            for f, factor in enumerate(chain.factors):
                p = factor.parameter
                g, new = gradients[id(p)], p.detach().double()
                change = new - old[id(p)]
                assert reading.per_chain("grad_norm")[c][f] == pytest.approx(g.norm().item(), rel=1e-12)
                assert reading.per_chain("update_norm")[c][f] == pytest.approx(change.norm().item(), rel=1e-12)
                assert reading.per_chain("weight_norm")[c][f] == pytest.approx(new.norm().item(), rel=1e-12)
                if old[id(p)].norm() > 0:
                    ratio = change.norm() / old[id(p)].norm()
                    assert reading.per_chain("update_ratio")[c][f] == pytest.approx(ratio.item(), rel=1e-12)
                else:
                    assert np.isnan(reading.per_chain("update_ratio")[c][f])
                if id(p) in previous and g.norm() > 0 and previous[id(p)].norm() > 0:
                    cosine = (g * previous[id(p)]).sum() / (g.norm() * previous[id(p)].norm())
                    assert reading.per_chain("grad_cosine_previous")[c][f] == pytest.approx(cosine.item(), abs=1e-12)
                else:
                    assert np.isnan(reading.per_chain("grad_cosine_previous")[c][f])
                along += (g * change).sum().item()
                total_g += g.square().sum().item()
                total_d += change.square().sum().item()
            assert reading.descent_cosine[c] == pytest.approx(-along / np.sqrt(total_g * total_d), abs=1e-12)
        previous = gradients


def test_first_step_of_a_chain_has_gradient_in_b_alone() -> None:
    """With B = 0 every other gradient is exactly zero, and with plain SGD nothing but B moves."""
    model = adapt("llama", "linchain-3-8")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    chains = find_chains(model, optimizer)
    reader = ChainReader(chains)
    model(**small_models.batch("llama")).loss.backward()
    reader.read_gradients()
    reader.read_before()
    optimizer.step()
    reading, _ = reader.read_after()
    for c in range(len(chains)):
        assert (reading.per_chain("grad_norm")[c][:-1] == 0).all()
        assert (reading.per_chain("update_norm")[c][:-1] == 0).all()
        assert reading.per_chain("grad_norm")[c][-1] > 0
        assert reading.descent_cosine[c] == pytest.approx(1.0, abs=1e-6)  # float32 updates
        # Only B moved, from zero, so the update is delta itself.
        length = len(reading.delta_spectrum[c])
        np.testing.assert_allclose(
            reading.delta_update_spectrum[c][:length], reading.delta_spectrum[c], rtol=1e-12, atol=1e-18
        )


def test_spectra_do_not_depend_on_the_gauge() -> None:
    """W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1} leaves delta and all that is measured of it."""
    model = adapt("llama", "linchain-3-8").double()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def spectrum() -> np.ndarray:
        reader = ChainReader(find_chains(model, optimizer)[:1])
        reader.read_gradients()
        reader.read_before()
        reading, _ = reader.read_after()
        sigma = reading.delta_spectrum[0]
        assert sigma is not None
        return sigma

    first = spectrum()
    chain = find_chains(model, optimizer)[0]
    w1, w2 = chain.factors[1], chain.factors[2]
    mixing = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q * torch.linspace(0.5, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        for factor, change in ((w1, lambda m: m @ mixing), (w2, lambda m: torch.linalg.inv(mixing) @ m)):
            view = factor.parameter.T if factor.transposed else factor.parameter
            new = change(view)
            factor.parameter.copy_(new.T if factor.transposed else new)
    np.testing.assert_allclose(spectrum(), first, rtol=1e-10)


def test_inf_and_nan_are_read_as_they_are() -> None:
    model = adapt("llama", "lora-8")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    chains = find_chains(model, optimizer)
    reader = ChainReader(chains)
    model(**small_models.batch("llama")).loss.backward()
    chains[0].factors[1].parameter.grad[0, 0] = float("inf")
    chains[1].factors[1].parameter.grad[0, 0] = float("nan")
    chains[2].factors[1].parameter.grad = None
    reader.read_gradients()
    reader.read_before()
    optimizer.step()
    reading, _ = reader.read_after()
    assert np.isposinf(reading.per_chain("grad_norm")[0][1])
    assert np.isnan(reading.per_chain("grad_norm")[1][1])
    assert np.isnan(reading.per_chain("grad_norm")[2][1])
    assert np.isnan(reading.delta_spectrum[0]).all()
    assert np.isnan(reading.delta_norm[0])
    assert (reading.delta_spectrum[2] == 0).all()
    assert np.isfinite(reading.delta_spectrum[3]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_extreme_sizes_neither_overflow_nor_vanish(scale: float) -> None:
    model = adapt("llama", "linchain-3-8")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    chains = find_chains(model, optimizer)[:1]
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in chains[0].factors:
            factor.parameter.normal_().mul_(scale)
    reader = ChainReader(chains)
    reader.read_gradients()
    reader.read_before()
    reading, _ = reader.read_after()
    product = torch.eye(chains[0].factors[0].shape[0], dtype=torch.float64)
    for factor in chains[0].factors:
        product = product @ (factor.parameter.detach().double() / scale).T
    expected = np.linalg.svd(product.numpy(), compute_uv=False)[:8] * chains[0].scale * scale ** len(chains[0].factors)
    # float32(weight · scale) differs from weight · scale by its own rounding, 6e-8 per factor
    np.testing.assert_allclose(reading.delta_spectrum[0], expected, rtol=1e-6, atol=1e-6 * expected[0])
