"""Loops that people write and that make a tracker say wrong things: each was seen to do so."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_

from linchain_analysis import Tracker, load_run, method_config


class WithHead(nn.Module):
    """An adapted body and a head that trains as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = get_peft_model(small_models.llama(), method_config("linchain-3-4", target_modules=["q_proj"]))
        self.head = nn.Linear(small_models.VOCABULARY, 3)

    def loss(self, seed: int) -> torch.Tensor:
        logits = self.body(input_ids=small_models.batch("llama", seed=seed)["input_ids"]).logits
        return self.head(logits).square().mean()

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def norm(parameters: list[nn.Parameter]) -> float:
    return float(np.sqrt(sum(p.grad.double().square().sum().item() for p in parameters if p.grad is not None)))


@pytest.fixture
def model() -> WithHead:
    return WithHead()


@pytest.fixture
def optimizer(model: WithHead) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.trained(), lr=0.1)


def test_clipping_of_a_part_first(model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path) -> None:
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        model.loss(0).backward()
        whole = norm(model.trained())
        clip_grad_norm_(model.head.parameters(), 1e-3)
        clip_grad_norm_(model.body.parameters(), 1e-4)
        optimizer.step()
    assert load_run(tmp_path / "run").steps["grad_norm"].item() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("by", ["value", "norms"])
def test_clipping_functions_imported_before_the_tracker(
    model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path, by: str
) -> None:
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        model.loss(0).backward()
        whole = norm(model.trained())
        if by == "value":
            clip_grad_value_(model.trained(), 1e-4)
        else:
            clip_grads_with_norm_(model.trained(), 1e-4, torch.tensor(whole))
        assert norm(model.trained()) < whole / 2  # it did clip
        optimizer.step()
    row = load_run(tmp_path / "run").steps.iloc[0]
    assert row["grad_norm"] == pytest.approx(whole, rel=1e-6)
    if by == "value":
        assert np.isnan(row["clip_coef"])
    else:
        assert row["clip_coef"] == pytest.approx(1e-4 / (whole + 1e-6), rel=1e-5)


def test_losses_scaled_before_any_backward(model: WithHead, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        first, second = model.loss(0), model.loss(1)
        scaled_first, scaled_second = scaler.scale([first, second])
        scaled_first.backward()
        scaled_second.backward()
        clip_grad_norm_(model.trained(), 1e9)  # without unscaling, as many do
        whole = norm(model.trained()) / 1024
        scaler.step(optimizer)
        scaler.update()
    row = load_run(tmp_path / "run").steps.iloc[0]
    assert row["loss"] == pytest.approx(first.item() + second.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_the_script_reuses(model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path) -> None:
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        loss = model.loss(0)
        loss.backward()
        expected = loss.item()
        loss.detach().mul_(100)
        optimizer.step()
    assert load_run(tmp_path / "run").steps["loss"].item() == pytest.approx(expected, rel=1e-12)


def test_a_step_that_raises_leaves_nothing_behind(
    model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    def break_once(*_: object) -> None:
        handle.remove()
        raise MemoryError

    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        handle = optimizer.register_step_pre_hook(break_once)
        model.loss(0).backward()
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.zero_grad()
        loss = model.loss(1)
        loss.backward()
        whole = norm(model.trained())
        optimizer.step()
    steps = load_run(tmp_path / "run").steps
    np.testing.assert_allclose(steps[["loss", "grad_norm"]], [[loss.item(), whole]], rtol=1e-6)


def test_a_discarded_batch_leaves_nothing_behind(
    model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        (model.loss(0) * float("nan")).backward()
        assert not torch.isfinite(clip_grad_norm_(model.trained(), 0.1))
        optimizer.zero_grad()
        loss = model.loss(1)
        loss.backward()
        whole = norm(model.trained())
        clip_grad_norm_(model.trained(), 0.1)
        optimizer.step()
    row = load_run(tmp_path / "run").steps.iloc[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert row["clip_coef"] == pytest.approx(min(1.0, 0.1 / (whole + 1e-6)), rel=1e-5)


def test_a_closure_that_clips(model: WithHead, tmp_path: Path) -> None:
    optimizer = torch.optim.LBFGS(model.trained(), lr=0.01, max_iter=4)
    norms = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        norms.append(norm(model.trained()))
        clip_grad_norm_(model.trained(), norms[-1] / 2)
        return loss

    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        optimizer.step(closure)
    row = load_run(tmp_path / "run").steps.iloc[0]
    assert len(norms) > 1
    assert row["grad_norm"] == pytest.approx(norms[0], rel=1e-6)
    assert row["clip_coef"] == pytest.approx(0.5, rel=1e-4)


def test_a_loss_that_reaches_the_head_alone(model: WithHead, optimizer: torch.optim.Optimizer, tmp_path: Path) -> None:
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        loss, penalty = model.loss(0), model.head.weight.square().sum()
        loss.backward()
        penalty.backward()
        optimizer.step()
    measured = load_run(tmp_path / "run").steps["loss"].item()
    assert measured == pytest.approx(loss.item() + penalty.item(), rel=1e-6)


def spectrum(path: Path, step: int) -> np.ndarray:
    modules = load_run(path).modules
    row = modules[(modules["step"] == step) & (modules["layer"] == 0)].iloc[0]
    return np.asarray(row["spectrum"])


def test_a_scale_that_changes_from_a_start_that_is_not_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = method_config("lora-4", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(small_models.llama(), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = layer.get_delta_weight("default").detach().double()
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        model(**small_models.batch("llama")).loss.backward()
        optimizer.step()
        layer.set_scale("default", 3.0)
        optimizer.step()
    expected = np.linalg.svd((layer.get_delta_weight("default").detach().double() - start).numpy(), compute_uv=False)
    # get_delta_weight multiplies in float32
    np.testing.assert_allclose(spectrum(tmp_path / "run", 2), expected[:8], rtol=0, atol=2e-6 * expected[0])


def test_what_stops_being_a_product_is_not_measured_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama(), method_config("lora-4", target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for step in range(3):
            if step == 1:
                layer.base_layer.weight.requires_grad_(True)
                optimizer.add_param_group({"params": [layer.base_layer.weight]})
            if step == 2:
                model.delete_adapter("default")
            optimizer.zero_grad()
            if step < 2:
                model(**small_models.batch("llama", seed=step)).loss.backward()
            optimizer.step()
    modules = load_run(tmp_path / "run").modules
    norms = modules[modules["layer"] == 0]["delta_norm"].to_numpy()
    assert norms[0] > 0
    assert np.isnan(norms[1:]).all()
    others = modules[modules["layer"] == 1]["delta_norm"].to_numpy()
    assert (others[:2] > 0).all()
    assert np.isnan(others[2])


def test_an_optimiser_step_that_is_compiled(model: WithHead, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    norms = []
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for seed in range(3):
            optimizer.zero_grad()
            model.loss(seed).backward()
            norms.append(norm(model.trained()))
            step()
    np.testing.assert_allclose(load_run(tmp_path / "run").steps["grad_norm"], norms, rtol=1e-6)


def test_a_tracker_that_is_kept_does_not_keep_the_optimiser(model: WithHead, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    before = sys.getrefcount(optimizer)
    tracker = Tracker(model, optimizer, tmp_path / "run", strict=True)
    model.loss(0).backward()
    optimizer.step()
    tracker.close()
    assert tracker.num_steps == 1
    assert sys.getrefcount(optimizer) == before
