"""The tracker in raw loops: what it writes, and that nobody notices it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import get_peft_model
from safetensors.numpy import load_file
from torch import nn

from linchain_analysis import Tracker, load_run, method_config
from linchain_analysis.errors import InputError


def adapted(method: str = "linchain-3-4", name: str = "llama", **overrides: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(
        small_models.BUILDERS[name](), method_config(method, target_modules=small_models.TARGETS[name], **overrides)
    )


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, clip: float | None = None) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(**small_models.batch("llama", seed=seed)).loss
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(trained(model), clip)
    optimizer.step()
    return loss.detach()


def total_norm(model: nn.Module) -> float:
    return float(np.sqrt(sum(p.grad.double().square().sum().item() for p in trained(model) if p.grad is not None)))


def test_every_step_has_its_rows(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses, norms = [], []
    with Tracker(model, optimizer, tmp_path / "run", init_seed=1, data_seed=2, problem="noise", strict=True) as tracker:
        for seed in range(4):
            losses.append(step(model, optimizer, seed).item())
            norms.append(total_norm(model))
    assert tracker.num_steps == 4
    run = load_run(tmp_path / "run")
    assert run.status == "complete"
    assert (run.method, run.problem, run.init_seed, run.data_seed) == ("linchain-3-4", "noise", 1, 2)
    assert run.base_learning_rate == pytest.approx(1e-2)
    steps = run.steps
    assert steps["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(steps["loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(steps["grad_norm"], norms, rtol=1e-6)
    np.testing.assert_allclose(steps["learning_rate"], 1e-2)
    assert (steps["clip_coef"] == 1).all()
    assert not steps["skipped"].any()
    assert (steps["seconds"] > 0).all()
    assert (steps["track_seconds"] > 0).all()
    num_modules = len(run.manifest.modules)
    assert num_modules == 10
    assert len(run.modules) == 4 * num_modules
    assert len(run.factors) == 4 * num_modules * 5
    assert run.factors["factor"].unique().tolist() == ["A", "W1", "W2", "W3", "B"]
    by_step = run.factors.groupby("step")["grad_norm"].apply(lambda g: np.sqrt((g**2).sum()))
    np.testing.assert_allclose(by_step, norms, rtol=1e-6)  # stored as float32


def run_with_and_without(tmp_path: Path, autocast: bool, clip: float | None, preset: str | None) -> dict[str, Any]:
    """Six steps with dropout; returns everything that a tracker could disturb."""
    model = adapted("linchain-3-4", lora_dropout=0.2)
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    tracker = Tracker(model, optimizer, tmp_path / "run", preset=preset, strict=True) if preset else None
    torch.manual_seed(5)
    losses = []
    for seed in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**small_models.batch("llama", seed=seed)).loss
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trained(model), clip)
            optimizer.step()
        losses.append(loss.detach())
        if tracker:
            tracker.log(accuracy=0.5)
    if tracker:
        tracker.close()
    return {
        "losses": torch.stack(losses),
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
    }


@pytest.mark.parametrize("preset", ["light", "standard", "full"])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_identical_with_and_without(
    tmp_path: Path, autocast: bool, clip: float | None, preset: str
) -> None:
    without = run_with_and_without(tmp_path, autocast, clip, None)
    with_tracker = run_with_and_without(tmp_path, autocast, clip, preset)
    assert torch.equal(without["losses"], with_tracker["losses"])
    for name, weight in without["weights"].items():
        assert torch.equal(weight, with_tracker["weights"][name]), name
    for a, b in zip(without["optimizer"]["state"].values(), with_tracker["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(without["torch"], with_tracker["torch"])
    np.testing.assert_array_equal(without["numpy"], with_tracker["numpy"])
    assert len(load_run(tmp_path / "run").steps) == 6


def test_gradients_are_those_before_clipping(tmp_path: Path) -> None:
    runs = {}
    for clip in (None, 1e-4):
        torch.manual_seed(0)
        model = adapted("lora-4")
        optimizer = torch.optim.SGD(trained(model), lr=0.0)  # the same weights at every step, clipped or not
        with Tracker(model, optimizer, tmp_path / str(clip), strict=True):
            for seed in range(3):
                step(model, optimizer, seed, clip)
        runs[clip] = load_run(tmp_path / str(clip))
    free, clipped = runs[None], runs[1e-4]
    np.testing.assert_allclose(clipped.steps["grad_norm"], free.steps["grad_norm"], rtol=1e-12)
    np.testing.assert_allclose(
        clipped.steps["clip_coef"], 1e-4 / (free.steps["grad_norm"] + 1e-6), rtol=1e-5
    )  # torch computes it in float32
    for column in ("grad_norm", "grad_cosine_previous"):
        np.testing.assert_array_equal(clipped.factors[column], free.factors[column])


def test_accumulated_gradients_and_losses_belong_to_one_step(tmp_path: Path) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    expected = []
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for first in (0, 4):
            optimizer.zero_grad()
            losses = []
            for seed in range(first, first + 4):
                loss = model(**small_models.batch("llama", seed=seed)).loss / 4
                loss.backward()
                losses.append(loss.item())
            expected.append((sum(losses), total_norm(model)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    steps = load_run(tmp_path / "run").steps
    np.testing.assert_allclose(steps[["loss", "grad_norm"]], expected, rtol=1e-6)


def test_a_clipping_before_the_last_accumulation_does_not_cut_the_gradient_short(tmp_path: Path) -> None:
    """A script that clips each micro-batch: what is recorded is the gradient that the step used."""
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        optimizer.zero_grad()
        for seed in range(2):
            model(**small_models.batch("llama", seed=seed)).loss.backward()
            if seed == 0:
                torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
        used = total_norm(model)
        optimizer.step()
    assert load_run(tmp_path / "run").steps["grad_norm"].item() == pytest.approx(used, rel=1e-6)


def test_losses_of_other_models_are_not_this_ones(tmp_path: Path) -> None:
    model, other = adapted("lora-4"), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        other(torch.ones(3)).sum().backward()
        loss = step(model, optimizer, 0)
        other(torch.ones(3)).sum().backward()
    assert load_run(tmp_path / "run").steps["loss"].item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.filterwarnings("error:Converting a tensor")
def test_log_overrides_and_adds(tmp_path: Path) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run", strict=True) as tracker:
        for seed in range(3):
            step(model, optimizer, seed)
            tracker.log(loss=torch.tensor(10.0 + seed, requires_grad=True), perplexity=2.0 * seed)
        tracker.log_eval("eval", loss=1.5, accuracy=0.25)
        with pytest.raises(InputError, match="one number"):
            tracker.log(loss=torch.ones(2))
    run = load_run(tmp_path / "run")
    assert run.steps["loss"].tolist() == [10, 11, 12]
    assert run.steps["perplexity"].tolist() == [0, 2, 4]
    assert run.evals[["step", "split", "metric", "value"]].values.tolist() == [
        [3, "eval", "loss", 1.5],
        [3, "eval", "accuracy", 0.25],
    ]


@pytest.mark.parametrize(
    ("every", "recorded"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (lambda s: s in (1, 5), [1, 5])]
)
def test_thinning_leaves_steps_complete_and_updates_single(tmp_path: Path, every: Any, recorded: list[int]) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    full = {}
    b = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    with Tracker(model, optimizer, tmp_path / "run", every=every, strict=True):
        for number in range(1, 7):
            before = b.detach().clone()
            step(model, optimizer, number)
            full[number] = (b.detach() - before).norm().item()
    run = load_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.steps[["loss", "grad_norm"]].notna().all().all()
    of_b = run.factors[(run.factors["module"] == "model.layers.0.self_attn.q_proj") & (run.factors["factor"] == "B")]
    assert of_b["step"].tolist() == recorded
    np.testing.assert_allclose(of_b["update_norm"], [full[s] for s in recorded], rtol=1e-6)


def test_a_closure_holds_the_whole_step(tmp_path: Path) -> None:
    """LBFGS and Lightning run backward inside the step, several times: the first evaluation is the step's."""
    model = adapted("lora-4")
    optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3)
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**small_models.batch("llama")).loss
        loss.backward()
        seen.append((loss.item(), total_norm(model)))
        return loss

    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        optimizer.step(closure)
        num_first = len(seen)
        optimizer.step(closure)
    assert num_first > 1
    steps = load_run(tmp_path / "run").steps
    np.testing.assert_allclose(steps[["loss", "grad_norm"]], [seen[0], seen[num_first]], rtol=1e-6)


def test_an_exception_of_the_training_closes_the_run_as_failed(tmp_path: Path) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with pytest.raises(RuntimeError, match="out of luck"), Tracker(model, optimizer, tmp_path / "run"):
        step(model, optimizer, 0)
        raise RuntimeError("out of luck")
    run = load_run(tmp_path / "run")
    assert run.status == "failed"
    assert "out of luck" in run.manifest.message
    assert len(run.steps) == 1


def test_a_fault_of_the_tracker_ends_tracking_and_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run") as tracker:
        step(model, optimizer, 0)
        monkeypatch.setattr(tracker._recorder._reader, "read_after", lambda extra, rates: 1 / 0)
        for seed in range(3):
            step(model, optimizer, seed)
    assert caplog.text.count("tracking of") == 1
    assert "ZeroDivisionError" in caplog.text
    run = load_run(tmp_path / "run")
    assert run.status == "failed"
    assert len(run.steps) == 1


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(2):
        model = adapted("lora-4")
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        with Tracker(model, optimizer, tmp_path / "run", strict=True) as tracker:
            step(model, optimizer, seed)
    assert tracker.path == tmp_path / "run-2"
    assert "holds a run already" in caplog.text
    first, second = load_run(tmp_path / "run").steps, load_run(tmp_path / "run-2").steps
    assert first["loss"].item() != second["loss"].item()


def test_nothing_stays_patched(tmp_path: Path) -> None:
    before = (torch.autograd.backward, torch.amp.GradScaler.step, torch.nn.utils.clip_grads_with_norm_)
    model = adapted("lora-4")
    with Tracker(model, torch.optim.SGD(trained(model), lr=0.1), tmp_path / "run", strict=True):
        assert torch.autograd.backward is not before[0]
    assert (torch.autograd.backward, torch.amp.GradScaler.step, torch.nn.utils.clip_grads_with_norm_) == before


def test_a_start_that_is_not_zero_is_kept_and_delta_measured_from_it(tmp_path: Path) -> None:
    model = adapted("lora-4", init_lora_weights="pissa")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)

    def effective_weight() -> torch.Tensor:
        return layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").detach().double()

    start = effective_weight()
    a = layer.lora_A["default"].weight.detach().clone()
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for seed in range(3):
            step(model, optimizer, seed)
    name = "model.layers.0.self_attn.q_proj"
    kept = load_file(tmp_path / "run" / "initial_factors.safetensors")
    np.testing.assert_array_equal(kept[f"{name}/A"], a.T.numpy())
    modules = load_run(tmp_path / "run").modules
    sigma = modules[(modules["module"] == name) & (modules["step"] == 3)]["spectrum"].item()
    expected = np.linalg.svd((effective_weight() - start).numpy(), compute_uv=False)
    # The reference adds a float32 product of size about 1 to a weight; its rounding is 1e-7 of that.
    np.testing.assert_allclose(sigma, expected[:8], rtol=0, atol=1e-6)
    assert expected[0] > 1e-3


def test_several_adapters_train_side_by_side(tmp_path: Path) -> None:
    model = adapted("linchain-3-4")
    model.add_adapter("second", method_config("linchain-2-4", target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for seed in range(2):
            step(model, optimizer, seed)
    run = load_run(tmp_path / "run")
    names = run.modules["module"].unique().tolist()
    assert "model.layers.0.self_attn.q_proj@second" in names
    assert "model.layers.0.self_attn.k_proj" in names
    last = run.modules[run.modules["step"] == 2].set_index("module")["spectrum"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for adapter in ("default", "second"):
        expected = np.linalg.svd(layer.get_delta_weight(adapter).detach().double().numpy(), compute_uv=False)
        measured = last[f"model.layers.0.self_attn.q_proj@{adapter}"]
        np.testing.assert_allclose(measured, expected[: len(measured)], rtol=0, atol=2e-6 * expected[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, use_reentrant: bool) -> None:
    losses = {}
    for checkpointing in (False, True):
        model = adapted("linchain-3-4")
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        with Tracker(model, optimizer, tmp_path / str(checkpointing), strict=True):
            for seed in range(2):
                step(model, optimizer, seed)
        losses[checkpointing] = load_run(tmp_path / str(checkpointing)).steps[["loss", "grad_norm"]]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-6)


def test_light_has_the_norms_of_standard_and_no_spectra(tmp_path: Path) -> None:
    runs = {}
    for preset in ("light", "standard"):
        model = adapted("linchain-3-4")
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        with Tracker(model, optimizer, tmp_path / preset, preset=preset, strict=True):
            for seed in range(3):
                step(model, optimizer, seed)
        runs[preset] = load_run(tmp_path / preset)
    light, standard = runs["light"], runs["standard"]
    for column in ("delta_norm", "delta_update_norm"):
        np.testing.assert_allclose(light.modules[column], standard.modules[column], rtol=1e-6)  # stored as float32
    for column in ("grad_norm", "update_norm", "weight_norm", "update_ratio"):
        np.testing.assert_array_equal(light.factors[column], standard.factors[column])
    assert light.modules["spectrum"].isna().all()
    for column in ("effective_rank", "stable_rank", "descent_cosine"):
        assert light.modules[column].isna().all()
        assert standard.modules[column].notna().all()
    assert light.factors["grad_cosine_previous"].isna().all()


def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    model = adapted("lora-4")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with pytest.raises(InputError, match="did you mean 'standard'"):
        Tracker(model, optimizer, tmp_path / "run", preset="standrad")
    with pytest.raises(InputError, match="got 0"):
        Tracker(model, optimizer, tmp_path / "run", every=0)
    with pytest.raises(InputError, match="got list"):
        Tracker(model, trained(model), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_model_without_adapters_has_its_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run"):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert "found none" in caplog.text
    run = load_run(tmp_path / "run")
    assert len(run.steps) == 1
    assert len(run.modules) == 0
