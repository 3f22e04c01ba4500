"""Sharpness: the largest eigenvalue of the Hessian of the loss over an adapter's factors.

By Lanczos' method on products of the Hessian with vectors, each a double backward pass. The Hessian depends on the
parametrisation: W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1} changes it, and so does the length of the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # only its name: torch raises it where a file would run code
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from linchain_analysis.auditing.texts import Batch, num_predicted
from linchain_analysis.errors import InputError
from linchain_analysis.measures.sharpness import stability_edge, top_eigenvalue
from linchain_analysis.measures.spectral import Array

_UNREADABLE = (OSError, SafetensorError, UnpicklingError, RuntimeError)
CAVEAT = (
    "Raw sharpness depends on the parametrisation: do not compare it between chain lengths. What an optimiser feels is "
    "its sharpness beside its own stability edge."
)


@dataclass(frozen=True)
class Preconditioner:
    """What Adam divides by: D = (1 − β₁ᵗ) (√v̂ + ε), over all factors in one vector.

    Attributes:
        diagonal: (dimension,), positive.
        beta1: Of its momentum; 0.9 where the state does not say.
    """

    diagonal: Array
    beta1: float = 0.9


@dataclass(frozen=True)
class Sharpness:
    """Sharpness of the loss on fixed data.

    Attributes:
        raw: Largest eigenvalue of H.
        gradient_descent_edge: Where gradient descent stops being stable; NaN without a learning rate.
        preconditioned: Largest eigenvalue of D^-½ H D^-½; NaN without the optimiser's state.
        adam_edge: Where Adam stops being stable; NaN without a learning rate.
        residual: ‖H y − λ y‖ of the raw one: H has an eigenvalue within this of it.
        num_parameters: Size of H.
        num_tokens: Predicted tokens of the data.
    """

    raw: float
    gradient_descent_edge: float
    preconditioned: float
    adam_edge: float
    residual: float
    num_parameters: int
    num_tokens: int


def measure_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    learning_rate: float | None = None,
    preconditioner: Preconditioner | None = None,
) -> Sharpness:
    """Take the largest Hessian eigenvalue over the parameters of `model` that require gradients, and Adam's.

    Args:
        model: In evaluation mode, with an attention that can be differentiated twice.
        batches: Fixed data.
        learning_rate: Says where the edges of stability lie.
        preconditioner: From `read_preconditioner`.
    """
    product = HessianProduct(model, list(trainable_factors(model).values()), batches)
    raw = top_eigenvalue(product, product.dimension)
    preconditioned = float("nan")
    beta1 = 0.9
    if preconditioner is not None:
        beta1 = preconditioner.beta1
        preconditioned = top_eigenvalue(product, product.dimension, preconditioner=preconditioner.diagonal).value
    edges = (float("nan"), float("nan"))
    if learning_rate is not None:
        edges = stability_edge("gradient_descent", learning_rate), stability_edge("adam", learning_rate, beta1)
    return Sharpness(
        raw=raw.value,
        gradient_descent_edge=edges[0],
        preconditioned=preconditioned,
        adam_edge=edges[1],
        residual=raw.residual,
        num_parameters=product.dimension,
        num_tokens=sum(map(num_predicted, batches)),
    )


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class HessianProduct:
    """Product of the Hessian of the mean loss with vectors, as NumPy float64 (dimension,).

    The model is in evaluation mode and the data are fixed, so that the Hessian is one symmetric matrix.

    Args:
        model: A model that returns a loss for a batch.
        parameters: What the Hessian is over.
        batches: Fixed data.
    """

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], batches: Sequence[Batch]) -> None:
        self._model = model
        self._parameters = list(parameters)
        self._batches = batches
        self.dimension = sum(parameter.numel() for parameter in self._parameters)

    def __call__(self, vector: Array) -> Array:
        """Return H v."""
        pieces = self._split(torch.from_numpy(np.array(vector, dtype=np.float64)))
        total = np.zeros(self.dimension)
        count = sum(map(num_predicted, self._batches))
        for batch in self._batches:
            weight = num_predicted(batch) / count
            if weight:
                total += weight * self._multiply(batch, pieces)
        return total

    def _multiply(self, batch: Batch, pieces: list[Tensor]) -> Array:
        loss = self._model(**batch).loss
        gradients = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        slope = torch.stack(
            [(g * piece).sum() for g, piece in zip(gradients, pieces, strict=True) if g is not None]
        ).sum()
        seconds = torch.autograd.grad(slope, self._parameters, allow_unused=True)
        return np.concatenate(
            [
                np.zeros(parameter.numel()) if second is None else second.detach().double().flatten().numpy()
                for parameter, second in zip(self._parameters, seconds, strict=True)
            ]
        )

    def _split(self, vector: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = zip(torch.split(vector, sizes), self._parameters, strict=True)
        return [part.view(parameter.shape).to(parameter.dtype) for part, parameter in parts]


def read_preconditioner(path: Path, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
    """Read Adam's second moments from a safetensors file or from a Trainer checkpoint's `optimizer.pt`.

    A safetensors file names each tensor as the model names the parameter (a prefix or ending `exp_avg_sq` is left out)
    and holds v̂ itself, of a long training (1 − β₁ᵗ = 1). `optimizer.pt` is opened with `weights_only=True`, which
    refuses code; its moments v are those of the parameters in their order, and v̂ = v / (1 − β₂ᵗ).

    Raises:
        InputError: The file holds no second moments, or not those of these parameters.
    """
    try:
        if path.suffix == ".safetensors":
            moments, beta1, warm_up, epsilon = _by_name(load_file(path), parameters), 0.9, 1.0, 1e-8
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            moments, beta1, warm_up, epsilon = _by_order(state)
    except (*_UNREADABLE, KeyError, IndexError, TypeError, ValueError) as error:
        raise _bad_state(path, " ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    for (name, parameter), moment in zip(parameters.items(), moments, strict=False):
        if moment.shape != parameter.shape:
            raise _bad_state(path, f"{tuple(moment.shape)} for {name} of {tuple(parameter.shape)}")
    if len(moments) != len(parameters):
        raise _bad_state(path, f"moments of {len(moments)} parameters in place of {len(parameters)}")
    flat = np.concatenate([moment.double().flatten().numpy() for moment in moments])
    return Preconditioner(warm_up * (np.sqrt(flat) + epsilon), beta1)


def _by_name(stored: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    plain = {key.replace("exp_avg_sq.", "").replace(".exp_avg_sq", ""): value for key, value in stored.items()}
    # Files of an adapter leave out its name, the model's parameters have it.
    return [plain[name] if name in plain else plain[name.replace(".default", "")] for name in parameters]


def _by_order(state: Mapping[str, Any]) -> tuple[list[Tensor], float, float, float]:
    """v̂ of each parameter, β₁, 1 − β₁ᵗ and ε."""
    groups = [group for group in state["param_groups"] if group["params"]]
    if len(groups) != 1:
        # Trainer sorts parameters into groups with and without weight decay, and their order is lost between them.
        raise ValueError(f"{len(groups)} groups of parameters, whose order among each other is not stored")
    (beta1, beta2), epsilon = groups[0]["betas"], groups[0]["eps"]
    entries = [state["state"][number] for number in groups[0]["params"]]
    steps = {float(entry["step"]) for entry in entries}
    if len(steps) != 1:
        raise ValueError(f"parameters that took different numbers of steps, {sorted(steps)}")
    step = steps.pop()
    moments = [entry["exp_avg_sq"] / (1 - beta2**step) for entry in entries]
    return moments, float(beta1), 1 - beta1**step, float(epsilon)


def _bad_state(path: Path, got: str) -> InputError:
    return InputError(
        f"--optimizer-state {path}",
        expected="Adam's exp_avg_sq of the adapter's factors",
        got=got,
        do="give the optimizer.pt of the same checkpoint, or a safetensors file that names the parameters",
    )
