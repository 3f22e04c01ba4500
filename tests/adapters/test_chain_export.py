"""Folding a chain into an ordinary LoRA, and loading adapters in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from linchain_analysis.adapters import LinChainConfig, fold_to_lora
from linchain_analysis.errors import InputError

OPTIONS = {"r": 4, "chain_length": 2, "chain_width": 6, "use_rslora": True, "lora_alpha": 5}


def test_delta_is_the_chains(case, build: Callable, stir: Callable, layers_of: Callable, tmp_path: Path) -> None:
    model = get_peft_model(build(case), LinChainConfig(**OPTIONS, target_modules=case.targets), adapter_name="mine")
    stir(model)
    expected = case.run(model)
    folded = fold_to_lora(model)
    assert type(folded.base_model) is LoraModel
    assert type(folded.peft_config["mine"]) is LoraConfig
    assert {type(layer).__module__ for layer in layers_of(folded)} == {"peft.tuners.lora.layer"}
    for chain, lora in zip(layers_of(model), layers_of(folded), strict=True):
        ours, theirs = chain.get_delta_weight("mine"), lora.get_delta_weight("mine")
        # Each entry of delta sums at most 6 products of 4 roundings, relative to the largest of them.
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6 * float(ours.abs().max()))
    torch.testing.assert_close(case.run(folded), expected, rtol=0, atol=1e-5)
    folded.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(build(case), tmp_path / "mine")
    assert torch.equal(case.run(plain), case.run(folded))
    torch.testing.assert_close(case.run(model), expected, rtol=0, atol=1e-6)  # the model itself is as it was
    assert isinstance(model.peft_config["mine"], LinChainConfig)


def small(**options: object) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return get_peft_model(base, LinChainConfig(**{**OPTIONS, "target_modules": ["0", "1"], **options}))


def test_product_is_formed_in_float64(stir: Callable) -> None:
    model = small(chain_length=6)
    stir(model)
    chain = model.base_model.model[0].lora_A["default"]
    exact = chain.A.double()
    for factor in chain.inner_factors():
        exact = factor.double() @ exact
    folded = fold_to_lora(model).base_model.model[0].lora_A["default"].weight
    assert torch.equal(folded, exact.float())


def test_half_precision_factors_are_widened(stir: Callable) -> None:
    torch.manual_seed(0)
    config = LinChainConfig(**OPTIONS, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7)).bfloat16(), config, autocast_adapter_dtype=False)
    stir(model)
    folded = fold_to_lora(model)
    assert {p.dtype for n, p in folded.named_parameters() if "lora_" in n} == {torch.float32}
    assert folded(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_of_several_adapters(stir: Callable) -> None:
    model = small()
    model.add_adapter("other", LinChainConfig(r=2, target_modules=["0"], chain_length=1))
    stir(model)
    x = torch.randn(2, 5)
    model.set_adapter("other")
    expected = model(x)
    model.set_adapter("default")
    folded = fold_to_lora(model, "other")
    assert list(folded.peft_config) == ["other"]
    assert not [name for name, _ in folded.named_parameters() if "default" in name]
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-6)


def test_base_weights_are_shared_on_request() -> None:
    model = small()
    base = model.base_model.model[0].base_layer.weight
    assert fold_to_lora(model).base_model.model[0].base_layer.weight is not base
    shared = fold_to_lora(model, copy_base=False)
    assert shared.base_model.model[0].base_layer.weight is base
    last = model.base_model.model[0].lora_B["default"].weight
    assert shared.base_model.model[0].lora_B["default"].weight is not last


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(InputError, match=r"'typo'.*|default.*'typo'"):
        fold_to_lora(small(), "typo")
    with pytest.raises(InputError, match="the model has none"):
        fold_to_lora(get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])))
    merged = small()
    merged.merge_adapter()
    with pytest.raises(InputError, match=r"got default; call unmerge_adapter"):
        fold_to_lora(merged)


def run_fresh(code: str) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_ORDERS = {
    "package, then peft": "import linchain_analysis, peft",
    "peft, then package": "import peft, linchain_analysis",
    "a name of the package": "from linchain_analysis import LinChainConfig",
    "transformers first": "import transformers, linchain_analysis",
    "a part of peft": "import linchain_analysis; from peft.tuners import lora",
}


_RARE_ORDERS = {"transformers first", "a part of peft"}  # each process takes as long as importing peft


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=pytest.mark.slow if order in _RARE_ORDERS else ()) for order in IMPORT_ORDERS]
)
def test_fresh_process_loads_a_saved_adapter(
    order: str, build: Callable, cases: dict, stir: Callable, tmp_path: Path
) -> None:
    case = cases["llama"]
    model = build(case)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, LinChainConfig(**OPTIONS, target_modules=case.targets, task_type="CAUSAL_LM"))
    stir(model)
    model.base_model.model.name_or_path = str(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "chain")
    expected = case.run(model).double().sum().item()
    printed = run_fresh(f"""
        {IMPORT_ORDERS[order]}
        import torch
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "chain")!r})
        ids = torch.tensor([[5, 7, 11, 13, 2], [3, 1, 4, 1, 5]])
        print(type(model.peft_config["default"]).__name__, model(input_ids=ids).logits.double().sum().item())
        import importlib, linchain_analysis.adapters
        importlib.reload(linchain_analysis.adapters)  # registering twice does no harm
    """)
    name, total = printed.split()[-2:]
    assert name == "LinChainConfig"
    assert float(total) == pytest.approx(expected, abs=1e-4)


def test_folded_adapter_loads_without_this_package(
    build: Callable, cases: dict, stir: Callable, tmp_path: Path
) -> None:
    case = cases["gpt2"]
    build(case).save_pretrained(tmp_path / "base")
    model = get_peft_model(build(case), LinChainConfig(**OPTIONS, target_modules=case.targets))
    stir(model)
    fold_to_lora(model).save_pretrained(tmp_path / "lora")
    printed = run_fresh(f"""
        import sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r})
        ids = torch.tensor([[5, 7, 11, 13, 2], [3, 1, 4, 1, 5]])
        print("linchain_analysis" in sys.modules, model(input_ids=ids).logits.double().sum().item())
    """)
    imported, total = printed.split()[-2:]
    assert imported == "False"
    assert float(total) == pytest.approx(case.run(model).double().sum().item(), abs=1e-4)


def test_importing_the_package_imports_neither_torch_nor_peft() -> None:
    printed = run_fresh("""
        import sys
        import linchain_analysis
        print([name for name in ("torch", "peft", "transformers", "pandas") if name in sys.modules])
    """)
    assert printed.strip() == "[]"
