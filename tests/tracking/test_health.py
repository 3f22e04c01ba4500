"""The health report: what keeps adapters from learning is found and said, and runs that are well are left in peace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from linchain_analysis import Tracker, load_run, method_config
from linchain_analysis.tracking.announcements import Announcements, Finding
from linchain_analysis.tracking.health import Health
from linchain_analysis.tracking.subjects import Subjects

TARGETS = ["q_proj", "v_proj"]
Loss = Callable[[nn.Module, int], torch.Tensor]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "target_modules": TARGETS, **options})


def adapted(config: Any = None, name: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(small_models.BUILDERS[name](), config or lora(), **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adam(parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


def loss_of(model: nn.Module, i: int, name: str = "llama") -> torch.Tensor:
    return model(**small_models.batch(name, seed=i)).loss


def train(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    num_steps: int = 12,
    loss: Loss = loss_of,
    before: Callable[[nn.Module, int], Any] = lambda model, i: None,
    after: Callable[[], Any] = lambda: None,
    num_passes: int = 1,
    **options: Any,
) -> dict[str, str]:
    """Train, and return the subjects of what was found, by finding; every row must be of one that began."""
    with Tracker(model, optimizer, path, strict=True, **options):
        for i in range(num_steps):
            before(model, i)
            optimizer.zero_grad()
            for j in range(num_passes):
                loss(model, i * num_passes + j).backward()
            optimizer.step()
            after()
    rows = load_run(path).read("health")
    assert rows["began"].all()
    return dict(zip(rows["finding"], rows["subject"], strict=True))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("linchain_analysis: ") for line in lines if line.startswith("linchain_analysis: health")]


# --- runs that are well -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True),
        lora(init_lora_weights="pissa"),
        method_config("linchain-3-8", target_modules=TARGETS),
        method_config("moslora-8", target_modules=TARGETS),
        lora(target_modules=["embed_tokens", "q_proj"]),
    ],
    ids=["lora", "rslora", "pissa", "linchain", "moslora", "embedding"],
)
@pytest.mark.parametrize(
    ("kind", "rate"), [(torch.optim.AdamW, 1e-5), (torch.optim.AdamW, 1e-2), (torch.optim.SGD, 1e-4)]
)
def test_nothing_is_found_of_a_run_that_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, kind: Any, rate: float
) -> None:
    model = adapted(config)
    assert train(tmp_path / "run", model, kind(trained(model), lr=rate), num_steps=25) == {}
    (line,) = said(capsys)
    assert line.startswith("health after step 10: ")
    if kind is torch.optim.AdamW:  # plain descent at a tiny rate rounds the first updates of A away, and says less
        assert "modules learn; gradients reach every factor, " in line


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, target_modules=TARGETS),
        LoKrConfig(r=4, target_modules=TARGETS),
        AdaLoraConfig(init_r=8, target_r=4, total_step=100, target_modules=TARGETS),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_adapters_of_another_kind_learn_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any) -> None:
    model = adapted(config)
    assert train(tmp_path / "run", model, adam(trained(model))) == {"refused": "all 4 modules"}
    (line,) = said(capsys)  # why delta is not measured has been said before
    assert line.startswith("health after step 10: all 4 modules learn; gradients reach every factor, ")
    assert line.endswith("ΔW of all 4 modules is not measured.")


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "roberta", "vit"])
def test_models_of_other_kinds_are_well(tmp_path: Path, name: str) -> None:
    model = adapted(lora(target_modules=small_models.TARGETS[name]), name)
    loss: Loss = lambda model, i: loss_of(model, i, name)  # noqa: E731
    assert train(tmp_path / "run", model, adam(trained(model)), loss=loss) == {}


@pytest.mark.parametrize(
    "options",
    [{"every": 10, "num_steps": 60}, {"preset": "light"}, {"preset": "full"}, {"num_passes": 3}, {"num_steps": 1}],
    ids=["every", "light", "full", "accumulation", "one-step"],
)
def test_ways_to_record_that_find_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    model = adapted()
    assert train(tmp_path / "run", model, adam(trained(model)), **options) == {}
    assert len(said(capsys)) == 1


def test_a_warm_up_from_zero_is_well(tmp_path: Path) -> None:
    model = adapted()
    optimizer = adam(trained(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: i / 20)
    assert train(tmp_path / "run", model, optimizer, after=schedule.step, num_steps=25) == {}


def test_a_frozen_a_is_told_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert train(tmp_path / "run", model, adam(trained(model))) == {"frozen": "A of all 4 modules"}
    first, second = said(capsys)
    assert "all 4 modules learn; gradients reach every factor that trains, B has left zero everywhere." in first
    assert "frozen: requires_grad is False on A of all 4 modules, which stays as it is" in second


def test_a_frozen_adapter_beside_one_that_learns_is_no_fault(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", lora())
    model.set_adapter("other")
    # Many hand the optimiser everything there is.
    assert train(tmp_path / "run", model, adam(model.parameters())) == {}


def test_adapters_that_take_turns_in_each_step_both_learn(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", lora())
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        model.set_adapter("default")
        first = loss_of(model, i)
        model.set_adapter("other")
        return first + loss_of(model, i)

    model.base_model.set_requires_grad(["default", "other"])
    assert train(tmp_path / "run", model, adam(parameters), loss=loss) == {}


def test_optimisers_that_share_an_adapter_do_not_blame_each_other(tmp_path: Path) -> None:
    model = adapted()
    others = adam([p for name, p in model.named_parameters() if "lora_A" in name])
    optimizer = adam([p for name, p in model.named_parameters() if "lora_B" in name])
    assert train(tmp_path / "run", model, optimizer, after=others.step) == {}


@pytest.mark.parametrize(("num_broken", "found"), [(6, {}), (12, {"skipping": "steps"})])
def test_steps_that_the_scaler_leaves_out(tmp_path: Path, num_broken: int, found: dict[str, str]) -> None:
    model = adapted()
    optimizer = adam(trained(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for i in range(25):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i)).backward()
            if i < num_broken:
                trained(model)[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    rows = load_run(tmp_path / "run").read("health")
    assert dict(zip(rows["finding"], rows["subject"], strict=True)) == found
    if found:
        assert rows["began"].tolist() == [True, False]
        assert rows["step"].tolist() == [10, 13]


# --- what keeps adapters from learning --------------------------------------------------------------------------


def test_reentrant_checkpointing_without_inputs_that_require_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in huggingface/peft issue 1142 and locuslab/open-unlearning issue 178: only the head outside learns."""
    model = adapted(lora(target_modules=[*TARGETS, "lm_head"]))
    base = model.base_model.model
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()  # transformers of today asks for them by itself
    model.train()
    found = train(tmp_path / "run", model, adam(trained(model)))
    assert found == {"no_gradient": "all 2 q_proj and all 2 v_proj"}
    (line,) = said(capsys)
    assert line.endswith(
        "call model.enable_input_require_grads() before gradient checkpointing with use_reentrant=True, or pass "
        "use_reentrant=False."
    )


def test_is_trainable_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(small_models.llama(), tmp_path / "adapter")
    model.enable_input_require_grads()  # without which backward itself fails
    assert train(tmp_path / "run", model, adam(model.parameters())) == {"adapter_frozen": "all 4 modules"}
    (line,) = said(capsys)
    assert "no factor of adapter 'default' (all 4 modules) requires a gradient" in line
    assert "PeftModel.from_pretrained(..., is_trainable=True)" in line


def test_is_trainable_forgotten_and_backward_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in huggingface/peft issues 282 and 1340."""
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(small_models.llama(), tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(tmp_path / "run", model, adam(model.parameters()))
    (line,) = said(capsys)
    assert line.startswith("health after step 0: adapter_frozen: no factor of adapter 'default'")


def test_a_script_that_fails_before_its_first_step_is_told_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        raise ValueError

    with pytest.raises(ValueError):
        train(tmp_path / "run", model, adam(trained(model)), loss=loss)
    assert said(capsys) == []


def test_is_trainable_forgotten_while_something_else_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(small_models.llama(), tmp_path / "adapter")
    head = nn.Parameter(torch.ones(()))
    found = train(tmp_path / "run", model, adam([head]), loss=lambda model, i: loss_of(model, i) * head)
    assert found == {"adapter_frozen": "all 4 adapted modules"}
    assert "No factor of adapter 'default' (all 4 adapted modules) requires a gradient" in caplog.text
    assert "get_peft_model before" not in caplog.text
    assert said(capsys) == []  # once is enough


def test_the_optimiser_was_made_before_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    base = small_models.llama()
    optimizer = adam(base.parameters())
    model = get_peft_model(base, lora())
    assert train(tmp_path / "run", model, optimizer) == {"not_in_optimizer": "all 4 modules"}
    (line,) = said(capsys)
    assert line.endswith("make the optimiser after get_peft_model (or after the adapter is added).")


def test_an_adapter_that_trains_and_is_not_the_active_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.add_adapter("other", lora())
    model.set_adapter("other")
    model.base_model.set_requires_grad("other", False)
    model.base_model.set_requires_grad("default", True)
    model.enable_input_require_grads()
    assert train(tmp_path / "run", model, adam(trained(model))) == {"adapter_inactive": "all 4 modules"}
    (line,) = said(capsys)
    assert "the active adapter is 'other', and 'default' (all 4 modules), which this run is about" in line
    assert "call model.set_adapter('default')" in line


def test_the_adapter_was_switched_after_the_optimiser_was_made(tmp_path: Path) -> None:
    """As in huggingface/peft issue 1303."""
    model = adapted()
    model.add_adapter("other", lora())
    optimizer = adam(trained(model))
    model.set_adapter("other")
    found = train(tmp_path / "run", model, optimizer)
    assert found.keys() == {"adapter_inactive", "not_in_optimizer"}
    assert found["adapter_inactive"] == "all 2 q_proj@default and all 2 v_proj@default"
    assert found["not_in_optimizer"] == "all 2 q_proj@other and all 2 v_proj@other"


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda m: m.base_model.disable_adapter_layers(), "adapter_disabled"),
        (lambda m: m.merge_adapter(), "adapter_merged"),
    ],
    ids=["disabled", "merged"],
)
def test_adapters_that_are_switched_off(tmp_path: Path, spoil: Any, finding: str) -> None:
    model = adapted()
    optimizer = adam(trained(model))
    spoil(model)
    model.enable_input_require_grads()
    assert train(tmp_path / "run", model, optimizer) == {finding: "all 4 modules"}


def test_gradients_that_stop_and_come_back(tmp_path: Path) -> None:
    model = adapted()
    optimizer = adam(trained(model))
    model.enable_input_require_grads()

    def switch(model: Any, i: int) -> None:
        if i == 15:
            model.merge_adapter()
        if i == 60:
            model.unmerge_adapter()

    with Tracker(model, optimizer, tmp_path / "run", strict=True):
        for i in range(100):
            switch(model, i)
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
    rows = load_run(tmp_path / "run").read("health")
    assert rows["finding"].tolist() == ["no_gradient", "no_gradient"]
    assert rows["began"].tolist() == [True, False]
    assert 35 <= rows["step"][0] <= 50
    assert 61 <= rows["step"][1] <= 85


def test_weights_too_coarse_for_their_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama().bfloat16(), lora(), autocast_adapter_dtype=False)
    found = train(tmp_path / "run", model, adam(trained(model), lr=1e-8))
    assert found == {"no_update": "A of all 4 modules"}
    (line,) = said(capsys)
    assert "lost in rounding to bfloat16: keep the adapter in float32" in line


def test_a_learning_rate_of_zero(tmp_path: Path) -> None:
    model = adapted()
    groups = [
        {"params": [p for n, p in model.named_parameters() if f"lora_{f}" in n], "lr": r}
        for f, r in (("A", 1e-3), ("B", 0.0))
    ]
    assert train(tmp_path / "run", model, adam(groups)) == {"zero_rate": "B of all 4 modules"}


@pytest.mark.parametrize("every", [1, 5])
def test_factors_that_are_set_back_to_zero(tmp_path: Path, every: int) -> None:
    """What users see in huggingface/peft issues 793 and 1402: training runs, and B stays zero."""
    model = adapted()
    optimizer = adam(trained(model))

    def set_back(*_: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()

    optimizer.register_step_post_hook(set_back)
    found = train(tmp_path / "run", model, optimizer, num_steps=60, every=every)
    assert found.keys() <= {"still_zero", "no_update"}
    assert "B of all 4 modules" in found.values()


def test_a_loss_that_does_not_depend_on_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    found = train(tmp_path / "run", model, adam(trained(model)), loss=lambda model, i: loss_of(model, i) * 0.0)
    assert found == {"no_gradient": "all 4 modules"}
    (line,) = said(capsys)
    assert "exactly zero" in line


def test_a_layer_that_is_never_called(tmp_path: Path) -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[1].self_attn
    layer.v_proj.forward = layer.v_proj.base_layer.forward
    found = train(tmp_path / "run", model, adam(trained(model)), every=10, num_steps=30)
    assert found == {"no_gradient": "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("every", [1, 7])
def test_nan_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int) -> None:
    model = adapted()

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        return loss_of(model, i) * (float("nan") if i == 3 else 1.0)

    found = train(tmp_path / "run", model, adam(trained(model)), loss=loss, every=every)
    assert found.keys() == {"non_finite"}
    expected = "the loss, the gradients of all 8 factors, the weights of all 8 factors"
    assert found["non_finite"] == (expected if every == 1 else "the loss, the gradients")
    (line,) = said(capsys)
    assert line.startswith("health after step 4: non_finite: NaN or Inf from step 4 on in the loss")


def test_the_first_factor_with_nan_is_named(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)

    def spoil(_: Any, i: int) -> None:
        if i == 4:
            layer = model.base_model.model.model.layers[1].self_attn.v_proj
            layer.lora_B["default"].weight.register_hook(lambda grad: grad * float("inf") if i == 4 else grad)

    found = train(tmp_path / "run", model, optimizer, before=spoil, num_steps=5)
    assert "the gradients of B of model.layers.1.self_attn.v_proj" in found["non_finite"]
    assert "the weights of B of model.layers.1.self_attn.v_proj" in found["non_finite"]
    assert "loss" not in found["non_finite"]


def test_one_direction_where_there_is_room_for_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name and "layers.0" in name:
                parameter[1:] = 0
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    found = train(tmp_path / "run", model, adam(trained(model)))
    assert found == {"frozen": "A of all 4 modules", "dead_directions": "all 2 modules of layer 0"}
    assert "learn; gradients reach every factor that trains" in said(capsys)[0]


def test_quiet_says_nothing_and_writes_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    found = train(tmp_path / "run", model, adam(trained(model), lr=0.0), quiet=True)
    assert found.keys() == {"zero_rate"}
    assert capsys.readouterr().err == ""


def test_the_report_keeps_neither_model_nor_optimiser(tmp_path: Path) -> None:
    import gc
    import weakref

    model = adapted()
    optimizer = adam(trained(model))
    health = Health([], model, optimizer, lambda columns: None, lambda line: None)
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None
    health.close()


# --- scripts ----------------------------------------------------------------------------------------------------

HEAD = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=48))
"""
CHECKPOINTING = """
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"]))
base.gradient_checkpointing_enable({"use_reentrant": True})
base.disable_input_require_grads()
model.train()
"""
FORGOTTEN = """
get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained("adapter")
base = LlamaForCausalLM(base.config)
model = PeftModel.from_pretrained(base, "adapter")
model.enable_input_require_grads()
"""
LOOP = """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(12):
    x = torch.randint(0, 48, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("trouble", "finding", "advice"),
    [
        (CHECKPOINTING, "no_gradient", "or pass use_reentrant=False."),
        (FORGOTTEN, "adapter_frozen", "is_trainable=True), before the optimiser is made."),
    ],
    ids=["checkpointing", "is_trainable"],
)
def test_a_launched_script_is_told(tmp_path: Path, trouble: str, finding: str, advice: str) -> None:
    (tmp_path / "train.py").write_text(HEAD + trouble + LOOP)
    done = subprocess.run(
        [sys.executable, "-m", "linchain_analysis.track", "--out", "run", "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("linchain_analysis: health")]
    assert line.startswith(f"linchain_analysis: health after step 10: {finding}: ")
    assert line.endswith(advice)
    assert load_run(tmp_path / "run").read("health")["finding"].tolist() == [finding]


# --- parts ------------------------------------------------------------------------------------------------------


def chains_of(kinds: list[str], num_layers: int, prefix: str = "model.layers", factors: str = "AB") -> list[Any]:
    return [
        SimpleNamespace(
            module=f"{prefix}.{layer}.{kind}",
            kind=kind,
            layer=layer,
            factors=[SimpleNamespace(name=name) for name in factors],
        )
        for layer in range(num_layers)
        for kind in kinds
    ]


def named(chains: list[Any], chosen: Callable[[Any], bool]) -> str:
    return Subjects(chains).modules(np.array([chosen(chain) for chain in chains]))


def test_modules_are_named_in_groups() -> None:
    chains = chains_of(["q_proj", "k_proj", "v_proj", "o_proj"], 16)
    assert named(chains, lambda c: True) == "all 64 modules"
    assert named(chains, lambda c: c.kind == "v_proj") == "all 16 v_proj"
    assert named(chains, lambda c: c.kind in ("q_proj", "v_proj")) == "all 16 q_proj and all 16 v_proj"
    assert named(chains, lambda c: c.kind == "q_proj" and c.layer < 4) == "q_proj of layers 0–3"
    assert named(chains, lambda c: c.kind == "q_proj" and c.layer in (0, 1, 5)) == "q_proj of layers 0–1 and 5"
    assert named(chains, lambda c: c.layer == 3) == "all 4 modules of layer 3"
    assert named(chains, lambda c: (c.kind, c.layer) == ("k_proj", 7)) == "model.layers.7.k_proj"
    odd = {("q_proj", 2), ("v_proj", 5), ("o_proj", 9)}
    assert named(chains, lambda c: (c.kind, c.layer) in odd) == "3 of 64 modules, first model.layers.2.q_proj"


def test_a_layer_number_that_two_stacks_have_is_not_used() -> None:
    chains = chains_of(["q", "v"], 2, "encoder.block") + chains_of(["q", "v"], 2, "decoder.block")
    assert named(chains, lambda c: c.module == "encoder.block.0.q") == "encoder.block.0.q"
    assert named(chains, lambda c: c.module.startswith("encoder")) == "4 of 8 modules, first encoder.block.0.q"
    assert named(chains, lambda c: c.layer == 1) == "all 4 modules of layer 1"


def test_factors_are_named_in_groups() -> None:
    chains = chains_of(["q_proj", "v_proj"], 2, factors="AWXB")
    subjects = Subjects(chains)
    names = np.array(list("AWXB") * 4)
    assert subjects.factors(names == "A") == "A of all 4 modules"
    assert subjects.factors(np.isin(names, ["A", "W"])) == "A and W of all 4 modules"
    assert subjects.factors(names != "B") == "every factor but B of all 4 modules"
    assert subjects.factors(names != "") == "all 4 modules"
    v = np.repeat([False, True, False, True], 4)
    assert subjects.factors(v) == "all 2 v_proj"
    assert subjects.factors(v & (names == "B") | ~v & (names == "A")) == "A of all 2 q_proj; B of all 2 v_proj"
    assert subjects.first(v & (names == "B")) == "B of model.layers.0.v_proj"


def test_a_finding_that_flaps_is_said_a_few_times_and_written_every_time() -> None:
    rows: list[Any] = []
    lines: list[str] = []
    announcements = Announcements(rows.append, lines.append)
    found = [Finding("odd", "x", "odd it is.")]
    for step in range(40):
        announcements.update(step, found if step % 4 < 2 else [], ["odd"])
    assert len(rows) == 20
    assert [row["began"][0] for row in rows] == [True, False] * 10
    assert len(lines) == 6
    assert lines[0] == "health after step 0: odd: odd it is."
    assert lines[1] == "health after step 3: odd has ended (x)."
    assert lines[4].endswith("(Said for the last time.)")
    announcements.update(50, found, ["odd"])
    announcements.update(51, [], ["odd"])  # one look without it is no end
    announcements.update(52, found, ["odd"])
    assert len(rows) == 21


def test_a_finding_that_grows_is_said_anew() -> None:
    rows: list[Any] = []
    lines: list[str] = []
    announcements = Announcements(rows.append, lines.append)
    for step, size in enumerate((1, 1, 2, 3, 4, 1)):
        announcements.update(step, [Finding("odd", f"{size} of them", "odd.", size)], ["odd"])
    assert [(row["step"][0], row["subject"][0], row["began"][0]) for row in rows] == [
        (0, "1 of them", True),
        (2, "1 of them", False),
        (2, "2 of them", True),
        (4, "2 of them", False),
        (4, "4 of them", True),
    ]
    assert len(lines) == 3
