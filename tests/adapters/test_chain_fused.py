"""The operation that fuses base and chain: its numbers, its gradients and what it keeps for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from adapters.single_layers import adapted, close, draw, gradients, is_fused, one_by_one, trained
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from linchain_analysis.adapters.fused import FusedLinear

SHAPES = [(6, 5), (5, 6), (8, 8)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3), (0, 3)])
def test_output_and_gradients(d_in: int, d_out: int, length: int, leading: tuple[int, ...], bias: bool) -> None:
    layer, x = adapted(d_in, d_out, bias=bias, chain_length=length), draw(*leading, d_in)
    output = layer(x)
    assert is_fused(output)
    close(output, one_by_one(layer, x))
    close(gradients(output, x, layer), gradients(one_by_one(layer, x), x, layer))


@pytest.mark.parametrize(("d_in", "d_out"), [(96, 64), (64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_a_chain_that_widens(d_in: int, d_out: int, dtype: torch.dtype) -> None:
    layer = adapted(d_in, d_out, dtype, r=8, chain_length=2, chain_width=16)
    x = draw(40, d_in, dtype=dtype)
    exact, exact_x = adapted(d_in, d_out, r=8, chain_length=2, chain_width=16), x.detach().double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    output, expected = layer(x), one_by_one(exact, exact_x)
    assert is_fused(output)
    pairs = zip((output, *gradients(output, x, layer)), (expected, *gradients(expected, exact_x, exact)), strict=True)
    for got, twin in pairs:
        assert got.dtype == dtype
        # Four roundings of matrices and one of the sum; float32 sums of up to 96 terms add some more.
        atol = 16 * torch.finfo(dtype).eps * float(twin.detach().abs().max())
        torch.testing.assert_close(got.double(), twin, rtol=0, atol=atol)


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("length", [0, 2])
def test_gradients_of_gradients(d_in: int, d_out: int, length: int) -> None:
    layer, x = adapted(d_in, d_out, r=2, chain_length=length), draw(2, 2, d_in)
    inputs = (x, *trained(layer))
    assert is_fused(layer(x))
    assert torch.autograd.gradcheck(lambda *_: layer(x), inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *_: layer(x), inputs, check_batched_grad=True)
    directions = [torch.randn_like(each) for each in inputs]
    products = []
    for forward in (layer, functools.partial(one_by_one, layer)):
        slopes = torch.autograd.grad(forward(x).sin().sum(), inputs, create_graph=True)
        along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
        products.append(torch.autograd.grad(along, inputs))
    close(*products)


def test_gradients_of_gradients_behind_dropout() -> None:
    inputs = [draw(3, 5), draw(3, 5), draw(2, 5), draw(6, 2)]
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    apply = functools.partial(lambda x, dropped, first, last: FusedLinear.apply(x, dropped, first, last, weight, bias))
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [0, 3])
def test_dropout_is_loras(dtype: torch.dtype, length: int) -> None:
    layer, x = adapted(6, 5, dtype, lora_dropout=0.5, chain_length=length).train(), draw(4, 3, 6, dtype=dtype)
    results = []
    for forward in (layer, functools.partial(one_by_one, layer)):
        torch.manual_seed(1)
        results.append(forward(x))
    assert is_fused(results[0])
    atol = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=0, atol=atol)
    torch.testing.assert_close(*(gradients(result, x, layer) for result in results), rtol=0, atol=atol)
    assert not torch.allclose(layer(x), results[0])
    assert torch.equal(layer.eval()(x), layer(x))


def test_layouts_of_input_and_gradient() -> None:
    layer = adapted(6, 5)
    for x in (draw(6, 3, 2).transpose(0, 2), draw(2, 3, 12)[..., ::2], draw(6).expand(2, 3, 6), draw(3, 2, 6).mT.mT):
        output, expected = layer(x), one_by_one(layer, x)
        assert is_fused(output)
        close(output, expected)
        upstream = torch.randn(*output.shape[::-1], dtype=torch.float64).permute(*range(output.dim())[::-1])
        for each in (upstream, torch.ones((), dtype=torch.float64).expand(output.shape)):
            inputs = [x, *trained(layer)]
            ours, twins = (torch.autograd.grad(y, inputs, each, retain_graph=True) for y in (output, expected))
            close(ours, twins)


def test_an_input_without_gradient_gets_none() -> None:
    layer, x = adapted(6, 5), draw(3, 6).detach()
    ours, twins = (torch.autograd.grad(y.square().sum(), trained(layer)) for y in (layer(x), one_by_one(layer, x)))
    close(ours, twins)


def test_inner_factors_may_be_frozen() -> None:
    layer, x = adapted(6, 5), draw(3, 6)
    layer.lora_A["default"].W2.requires_grad_(False)
    assert is_fused(layer(x))
    close(gradients(layer(x), x, layer), gradients(one_by_one(layer, x), x, layer))


def test_result_may_be_changed_in_place() -> None:
    for leading, bias in (((3,), True), ((2, 3), True), ((2, 3), False)):
        layer, x = adapted(6, 5, bias=bias), draw(*leading, 6)
        ours, twin = F.relu(layer(x), inplace=True), F.relu(one_by_one(layer, x))
        close(gradients(ours, x, layer), gradients(twin, x, layer))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph(context: Callable) -> None:
    layer, x = adapted(6, 5), draw(2, 3, 6)
    recorded = layer(x)
    with context():
        assert torch.equal(layer(x), recorded)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(x_dtype: torch.dtype, base_dtype: torch.dtype, length: int, dropout: float) -> None:
    """The numbers of the separate operations, for which a hook on the base layer asks, bit by bit in the output."""
    layer = adapted(6, 5, torch.float32, chain_length=length, lora_dropout=dropout).train()
    layer.base_layer.to(base_dtype)
    x, results = draw(7, 6, dtype=x_dtype), []
    for is_hooked in (False, True):
        hook = layer.base_layer.register_forward_hook(lambda *_: None) if is_hooked else None
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
            assert output.dtype == torch.bfloat16
            assert is_fused(output) is not is_hooked
            results.append((output, *gradients(output, x, layer)))
        if hook is not None:
            hook.remove()
    assert torch.equal(results[0][0], results[1][0])
    for ours, separate in zip(*results, strict=True):
        assert ours.dtype == separate.dtype
        atol = 4 * torch.finfo(torch.bfloat16).eps * float(separate.detach().abs().max())
        torch.testing.assert_close(ours, separate, rtol=0, atol=atol)


def test_float64_is_left_to_autocast() -> None:
    layer, x = adapted(6, 5), draw(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.float64
    close(output, one_by_one(layer, x))


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "recomputed": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        ),
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gradient_checkpointing(kind: str) -> None:
    layer, x = adapted(6, 5), draw(2, 3, 6)
    checkpoint(lambda y: layer(y).sin(), x, **CHECKPOINTS[kind]).sum().backward()
    got = (x.grad, *[parameter.grad for parameter in trained(layer)])
    close(got, torch.autograd.grad(one_by_one(layer, x).sin().sum(), [x, *trained(layer)]))


def kept_per_token(layer: nn.Module) -> int:
    """Bytes that one more token keeps for backward, each memory counted once."""
    sizes = []
    for num_tokens in (64, 65):
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(draw(num_tokens, layer.in_features, dtype=torch.float32))
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
        del output
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize(
    ("d_in", "d_out", "train"),
    [
        (12, 8, ("lora_A", "lora_B")),
        (8, 12, ("lora_A", "lora_B")),
        (12, 8, ("lora_B",)),
        (8, 12, ("lora_B",)),
        (8, 12, ("lora_A",)),
    ],
)
def test_keeps_no_more_per_token_than_lora(
    d_in: int, d_out: int, length: int, dropout: float, autocast: bool, train: tuple[str, ...]
) -> None:
    layer = adapted(d_in, d_out, torch.float32, chain_length=length, lora_dropout=dropout).train()
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout)
    lora = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), config).base_model.model[0].train()
    sizes = []
    for each in (layer, lora):
        for part in ("lora_A", "lora_B"):
            getattr(each, part).requires_grad_(part in train)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sizes.append(kept_per_token(each))
    assert 0 < sizes[0] <= sizes[1]
