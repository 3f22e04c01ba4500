"""What a delta does to the loss: functional rank and sharpness, against dense twins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from linchain_analysis import LinChainConfig
from linchain_analysis.auditing import read_adapter
from linchain_analysis.auditing.base import base_weight, load_adapted, load_base
from linchain_analysis.auditing.curvature import (
    HessianProduct,
    measure_sharpness,
    read_preconditioner,
    trainable_factors,
)
from linchain_analysis.auditing.texts import load_batches, num_predicted
from linchain_analysis.auditing.truncation import measure_functional_rank
from linchain_analysis.errors import InputError
from linchain_analysis.problems.loading import BUILTIN_MODEL


def _batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [small_models.batch("llama", seed=seed, size=2 + seed) for seed in range(count)]


def _dense_loss(path: Path, adapter: Any, k: int, batches: Any) -> float:
    """Loss of the base model with the truncated dense deltas added to its weights."""
    model = load_base(str(path.parent / "base"), adapter.config, dtype=torch.float32)
    for chain in adapter.chains:
        delta = chain.scale * np.linalg.multi_dot(adapter.read(chain))
        u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
        base_weight(model, chain).add_(torch.from_numpy((u[:, :k] * sigma[:k]) @ vt[:k]).float())
    with torch.no_grad():
        losses = [float(model(**batch).loss) * num_predicted(batch) for batch in batches]
    return sum(losses) / sum(map(num_predicted, batches))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        LinChainConfig(r=4, chain_length=2, target_modules=["v_proj", "up_proj", "embed_tokens"]),
    ],
)
def test_truncation_against_dense_weights(config: Any, save: Any) -> None:
    path = save("llama", config, steps=12, base=True)
    adapter = read_adapter(path)
    model = load_adapted(str(path.parent / "base"), adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_functional_rank(model, adapter, _batches(), keep=1.0)
    for k, loss in found.losses.items():
        assert loss == pytest.approx(_dense_loss(path, adapter, k, _batches()), abs=2e-5)
    assert found.base_loss == pytest.approx(_dense_loss(path, adapter, 0, _batches()), abs=2e-5)
    assert found.adapted_loss == pytest.approx(_dense_loss(path, adapter, 99, _batches()), abs=2e-5)
    assert found.gain > 1e-3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_two_directions_are_enough_where_the_truth_has_two(save: Any, tmp_path: Path) -> None:
    source = save("llama", LoraConfig(r=5, target_modules=["q_proj", "up_proj", "down_proj"]), steps=15, base=True)
    shutil.copytree(source, tmp_path / "adapter")
    shutil.copytree(source.parent / "base", tmp_path / "base")
    tensors = load_file(source / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        a = tensors[name.replace("lora_B", "lora_A")]
        u, sigma, vt = torch.linalg.svd((tensors[name] @ a).double(), full_matrices=False)
        # Two equally strong directions, and three of a thousandth.
        noise = torch.randn(3, generator=generator).double().abs() * 1e-3 * sigma[0]
        strength = torch.cat([sigma[:1] * 1.001, sigma[:1], noise.sort(descending=True).values])
        tensors[name] = (u[:, :5] * strength).float().contiguous()
        tensors[name.replace("lora_B", "lora_A")] = vt[:5].float().contiguous()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path / "adapter")
    found = measure_functional_rank(load_adapted(str(tmp_path / "base"), adapter), adapter, _batches(3))
    assert found.gain > 0
    assert found.rank == 2
    assert list(found.losses) == [0, 1, 2]


def test_an_adapter_that_does_not_help_has_no_functional_rank(save: Any, tmp_path: Path) -> None:
    path = save("llama", LoraConfig(r=4, target_modules=["q_proj"]), steps=0, base=True)
    adapter = read_adapter(path)
    found = measure_functional_rank(load_adapted(str(path.parent / "base"), adapter), adapter, _batches())
    assert np.isnan(found.rank) and found.gain == 0
    with pytest.raises(InputError, match="--keep"):
        measure_functional_rank(None, adapter, _batches(), keep=1.5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 48 trained numbers, and Adam's state."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    model = small_models.llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model.save_pretrained(folder / "base")
    config = LinChainConfig(r=2, chain_length=2, target_modules=["v_proj"], lora_alpha=8)
    adapted = get_peft_model(model.eval(), config)
    # As the Trainer groups them: with weight decay, and without, of which there are none here.
    groups = [{"params": [p for p in adapted.parameters() if p.requires_grad], "weight_decay": 0.1}, {"params": []}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(8):
        adapted(**small_models.batch("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def _dense_hessian(model: nn.Module, batches: Any) -> torch.Tensor:
    """Hessian by automatic differentiation of the loss of one flat vector, in float64."""
    model = model.double()
    parameters = trainable_factors(model)
    sizes = [parameter.numel() for parameter in parameters.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = {
            name: piece.view(parameter.shape)
            for (name, parameter), piece in zip(parameters.items(), flat.split(sizes), strict=True)
        }
        counts = [num_predicted(batch) for batch in batches]
        terms = [torch.func.functional_call(model, pieces, (), dict(batch)).loss for batch in batches]
        return sum(term * count for term, count in zip(terms, counts, strict=True)) / sum(counts)

    start = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    return torch.autograd.functional.hessian(loss, start)


def test_sharpness_against_the_dense_hessian(small: Path) -> None:
    adapter = read_adapter(small / "adapter")
    model = load_adapted(str(small / "base"), adapter)
    found = measure_sharpness(model, _batches(), learning_rate=1e-2)
    dense = _dense_hessian(load_adapted(str(small / "base"), adapter), _batches()).numpy()
    assert found.num_parameters == len(dense)
    top = np.linalg.eigvalsh(dense)[-1]
    assert found.raw == pytest.approx(top, rel=1e-3)  # products in float32, and Lanczos to 1e-4
    assert found.gradient_descent_edge == pytest.approx(200) and found.adam_edge == pytest.approx(3800)
    assert np.isnan(found.preconditioned)

    product = HessianProduct(model.double(), list(trainable_factors(model).values()), _batches())
    vector = np.random.default_rng(0).standard_normal(product.dimension)
    # The model takes its softmax and its norms in float32 whatever its dtype.
    np.testing.assert_allclose(product(vector), dense @ vector, rtol=0, atol=1e-5 * np.abs(dense @ vector).max())


def test_preconditioned_sharpness_from_the_optimisers_state(small: Path, tmp_path: Path) -> None:
    adapter = read_adapter(small / "adapter")
    model = load_adapted(str(small / "base"), adapter)
    parameters = trainable_factors(model)
    preconditioner = read_preconditioner(small / "optimizer.pt", parameters)
    state = torch.load(small / "optimizer.pt", weights_only=True)["state"]
    v = torch.cat([state[i]["exp_avg_sq"].flatten() for i in range(len(state))]).double().numpy()
    diagonal = (1 - 0.9**8) * (np.sqrt(v / (1 - 0.999**8)) + 1e-8)
    np.testing.assert_allclose(preconditioner.diagonal, diagonal, rtol=1e-6)
    found = measure_sharpness(model, _batches(), learning_rate=1e-2, preconditioner=preconditioner)
    dense = _dense_hessian(load_adapted(str(small / "base"), adapter), _batches()).numpy()
    top = np.linalg.eigvalsh(dense / np.sqrt(np.outer(diagonal, diagonal)))[-1]
    assert found.preconditioned == pytest.approx(top, rel=1e-3)

    named = {name: state[i]["exp_avg_sq"].contiguous() for i, name in enumerate(parameters)}
    save_file(named, tmp_path / "moments.safetensors")
    expected = np.sqrt(v) + 1e-8
    np.testing.assert_allclose(
        read_preconditioner(tmp_path / "moments.safetensors", parameters).diagonal, expected, rtol=1e-6
    )
    save_file({"something": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match="exp_avg_sq"):
        read_preconditioner(tmp_path / "wrong.safetensors", parameters)
    with pytest.raises(InputError, match="exp_avg_sq"):
        read_preconditioner(small / "optimizer.pt", dict(list(parameters.items())[:-1]))


def test_a_state_that_would_run_code_is_refused(small: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save(Evil(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="UnpicklingError"):
        read_preconditioner(tmp_path / "optimizer.pt", {})
    assert not (tmp_path / "ran").exists()


def test_texts_become_batches(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("1+2=3\n\n10+5=15\n7-4=3\n")
    first, second = load_batches(tmp_path / "lines.txt", str(BUILTIN_MODEL), batch_size=2)
    assert len(first["input_ids"]) == 2 and len(second["input_ids"]) == 1
    padded = first["attention_mask"] == 0
    assert padded.any() and (first["labels"][padded] == -100).all()
    assert num_predicted(second) == second["input_ids"].shape[1] - 1
    (tmp_path / "records.json").write_text('[{"instruction": "1+2=", "output": "3"}]')
    (batch,) = load_batches(tmp_path / "records.json", str(BUILTIN_MODEL), template="plain")
    assert batch["input_ids"].shape[1] > 4
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="at least one line"):
        load_batches(tmp_path / "empty.txt", str(BUILTIN_MODEL))
