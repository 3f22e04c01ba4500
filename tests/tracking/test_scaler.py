"""Gradient scaling: recorded gradients and losses are unscaled, and steps left out are recorded as skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from peft import get_peft_model

from linchain_analysis import Tracker, load_run, method_config


def train(tmp_path: Path, *, scaled: bool, fused: bool, unscale: bool, clip: bool, break_step: int | None = None):
    torch.manual_seed(1)
    model = get_peft_model(small_models.llama(), method_config("lora-4", target_modules=["q_proj", "v_proj"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    path = tmp_path / f"{scaled}-{fused}-{unscale}-{clip}"
    with Tracker(model, optimizer, path, strict=True):
        for seed in range(4):
            optimizer.zero_grad()
            for half in range(2):
                loss = model(**small_models.batch("llama", seed=2 * seed + half)).loss
                scaled_loss = scaler.scale(loss) / 2 if half else scaler.scale(loss / 2)
                scaled_loss.backward()
            if seed == break_step:
                parameters[0].grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, 0.1 if unscale else 0.1 * scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    return load_run(path)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, False), (True, True), (False, True)])
def test_scaling_leaves_no_trace_in_the_numbers(tmp_path: Path, fused: bool, unscale: bool, clip: bool) -> None:
    plain = train(tmp_path, scaled=False, fused=fused, unscale=unscale, clip=clip)
    scaled = train(tmp_path, scaled=True, fused=fused, unscale=unscale, clip=clip)
    assert len(scaled.steps) == 4
    assert not scaled.steps["skipped"].any()
    # The scale is a power of two, but 1e-6 in the clipping coefficient and Adam's epsilon see its rounding.
    for column in ("loss", "grad_norm", "clip_coef"):
        np.testing.assert_allclose(scaled.steps[column], plain.steps[column], rtol=1e-4, err_msg=column)
    for column in ("grad_norm", "update_norm"):
        np.testing.assert_allclose(scaled.factors[column], plain.factors[column], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, True)])
def test_a_step_left_out_is_recorded_as_skipped(tmp_path: Path, fused: bool, unscale: bool, clip: bool) -> None:
    run = train(tmp_path, scaled=True, fused=fused, unscale=unscale, clip=clip, break_step=1)
    assert run.steps["skipped"].tolist() == [False, True, False, False]
    assert not np.isfinite(run.steps["grad_norm"][1])
    assert np.isfinite(run.steps["grad_norm"][[0, 2, 3]]).all()
    skipped = run.factors[run.factors["step"] == 2]
    assert (skipped["update_norm"] == 0).all()
    assert np.isposinf(skipped["grad_norm"].iloc[0])
    assert np.isfinite(skipped["grad_norm"].iloc[1])
