"""What is measured is what it says: loops that train, memory that is counted, a chain without folding."""

from pathlib import Path

import pytest
import torch
from torch import nn

from linchain_analysis.benchmarks import linchain, log, reading
from linchain_analysis.benchmarks.allocations import count_living, find_peak, measure_peak
from linchain_analysis.benchmarks.loops import Switch, SyntheticLoop, TrainingLoop
from linchain_analysis.benchmarks.memory import largest_group
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_llama, build_stack, draw_tokens
from linchain_analysis.runs import load_run


def test_a_synthetic_step_brings_the_gradients_it_was_given() -> None:
    loop = SyntheticLoop(build_stack(2, 8, 2))
    before = [parameter.detach().clone() for parameter in loop.parameters]
    assert len(before) == 10  # A, W1, W2, W3, B of two layers
    loop.step()
    norm = torch.stack([gradient.square().sum() for gradient in loop.gradients]).sum().sqrt()
    for old, new, gradient in zip(before, loop.parameters, loop.gradients, strict=True):
        # SGD with a rate of 1e-3 after clipping to a norm of 1; float32, and clip_grad_norm_ adds 1e-6 to the norm
        torch.testing.assert_close(new.detach(), old - 1e-3 * gradient / norm, rtol=1e-5, atol=1e-7)
        assert new.grad is None


def test_adapted_models_share_the_base_and_nothing_else() -> None:
    base = build_llama(16, 1)
    one, other = adapt_by_method(base), adapt_by_method(base)
    frozen = {parameter.data_ptr() for parameter in base.parameters()}
    for model in (one, other):
        assert frozen == {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in (one, other)]
    assert not trained[0] & trained[1]


def test_the_switch_tracks_only_while_it_is_on(tmp_path: Path) -> None:
    loop = TrainingLoop(adapt_by_method(build_llama(16, 1)), draw_tokens(2, 8))
    switch = Switch(loop, tmp_path, "light")
    switch.turn_on()
    loop.step()
    switch.turn_on()
    loop.step()
    switch.turn_off()
    assert switch.track_seconds.shape == (2,)  # the step taken at the turn is left out
    loop.step()
    switch.turn_off()
    assert switch.track_seconds.shape == (2,)
    assert list(tmp_path.iterdir()) == []
    assert loop.update_seconds > 0


def test_factor_by_factor_is_the_same_function_as_the_chain() -> None:
    base = nn.Linear(12, 12, bias=False)
    chain = linchain.adapt_layer(base, "linchain-3-16")
    plain = linchain.apply_one_by_one(nn.Sequential(linchain.adapt_layer(base, "lora-16")), num_inner=3)
    unfolded = plain.get_submodule("0.lora_A.default")
    held = dict(chain.named_parameters())
    with torch.no_grad():
        unfolded.first.weight.copy_(held["lora_A.default.A"])
        for number, layer in enumerate(unfolded.inner, start=1):
            layer.weight.copy_(held[f"lora_A.default.W{number}"])
        plain[0].lora_B["default"].weight.copy_(held["lora_B.default.weight"])
    x = torch.randn(3, 12)
    torch.testing.assert_close(plain(x), chain(x), rtol=1e-5, atol=1e-5)


def test_saved_bytes_leave_parameters_out_and_count_each_storage_once() -> None:
    layer = nn.Linear(4, 6, bias=False)
    x = torch.randn(5, 4)
    assert linchain.count_saved(layer, x) == 5 * 4 * 4  # the input alone
    assert linchain.count_saved(nn.Sequential(layer, nn.Tanh()), x) == 5 * 4 * 4 + 5 * 6 * 4


def test_memory_that_somebody_holds_is_counted() -> None:
    before = count_living()
    held = {"deep": [torch.zeros(1000), torch.zeros(500, dtype=torch.float64)]}
    held["deep"].append(held["deep"][0][:10])  # a view has no memory of its own
    after = count_living()
    assert sum(size for address, size in after.items() if address not in before) == 8000
    del held


def test_the_peak_is_above_the_start_of_the_last_step() -> None:
    def event(ts: float, size: int) -> dict[str, object]:
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Ev Idx": int(ts)}}

    step = {"name": "measured step", "ts": 10.0, "dur": 10.0}
    events = [event(1, 1000), event(14, 30), event(12, 50), event(13, -50), event(15, -30), event(30, 500), step]
    assert find_peak(events) == 50


def test_the_peak_of_a_step_counts_what_is_let_go_again(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = [torch.zeros(100)]

    def step() -> None:
        temporary = torch.zeros(1000)
        kept[0] = torch.ones(100)
        del temporary

    assert measure_peak(step, tmp_path) == 4400
    assert list(tmp_path.iterdir()) == []


def test_the_largest_group_is_that_of_most_bytes() -> None:
    # Five layers: q, k, v are 16 × 16, up 16 × 43, down 43 × 16; ranks 16, three inner factors of 16 × 16.
    loop = SyntheticLoop(adapt_by_method(build_llama(16, 1)))
    assert largest_group(loop) == 3 * (16 * 16 + 3 * 16 * 16 + 16 * 16) * 4


def test_a_synthetic_run_reads_back(tmp_path: Path) -> None:
    run = load_run(reading.write_run(tmp_path / "run", num_modules=10, num_steps=7))
    assert run.status == "complete"
    assert (len(run.steps), len(run.modules), len(run.factors)) == (7, 70, 350)
    assert run.modules["effective_rank"].between(1, 16).all()
    scalars = dict(zip(reading.TABLES, reading.read_scalars(run.path, reading.TABLES), strict=True))
    assert "spectrum" not in scalars["modules"]
    assert {"effective_rank", "delta_norm", "descent_cosine"} <= set(scalars["modules"])
    assert log.count_files(run.path, ".parquet") > 0
    assert log.count_files(run.path, ".arrows") == 0


@pytest.mark.parametrize("method", ["lora-16", "linchain-3-16"])
def test_layer_passes_leave_no_gradient(method: str) -> None:
    base = nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer = linchain.adapt_layer(base, method)
    x = torch.randn(2, 3, 8, requires_grad=True)
    linchain.LayerPasses(layer, x, 2).run()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in layer.parameters())
