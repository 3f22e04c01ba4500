"""The base model of an adapter: loaded as its task asks, its weights one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from linchain_analysis.auditing.saved import SavedAdapter, SavedChain
from linchain_analysis.errors import InputError

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_base(name: str, config: Mapping[str, Any], *, dtype: torch.dtype | str = "auto") -> Any:
    """Return the base model in evaluation mode, with the attention whose gradient can be differentiated again.

    Args:
        name: Folder or hub name.
        config: Of the adapter: its task type, or else the class of the model it was made with, says what to load.
        dtype: Of the weights; as they are stored unless told otherwise.

    Raises:
        InputError: There is no such model.
    """
    mapping = config.get("auto_mapping") or {}
    title = _CLASSES.get(str(config.get("task_type")), str(mapping.get("base_model_class", "AutoModel")))
    kind = getattr(transformers, title, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        kind = transformers.AutoModel
    try:
        with _quiet():
            model = kind.from_pretrained(name, dtype=dtype, attn_implementation="eager", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {name}",
            expected="a model of transformers with safetensors, in a folder or on the hub",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            do="check the name, or the connection for a model of the hub",
        ) from error
    return model.eval()


def load_adapted(name: str, adapter: SavedAdapter) -> Any:
    """Return the base model in float32 with `adapter` on it, its factors requiring gradients, in evaluation mode."""
    model = load_base(name, adapter.config, dtype=torch.float32)
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=True)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--model {name}",
            expected=f"the base model of {adapter.name}",
            got=" ".join(str(error).split())[:300],
            do="name the model that the adapter was trained on",
        ) from error
    return adapted.eval()


def base_weight(model: nn.Module, chain: SavedChain) -> torch.Tensor:
    """Return W_0 (d_in, d_out) of one adapted matrix as it is stored, in the orientation of its delta.

    Raises:
        InputError: The model has no such layer, or one of another shape.
    """
    try:
        layer: Any = model.get_submodule(chain.module)
        weight = getattr(layer, "in_proj_weight", None) if isinstance(layer, nn.MultiheadAttention) else layer.weight
    except AttributeError as error:
        raise _mismatch(chain, "no such layer") from error
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
        raise _mismatch(chain, "a weight that cannot be read as numbers")
    matrix = weight.detach().flatten(1)
    # Stored (d_in, d_out) there, and (d_out, d_in) everywhere else.
    matrix = matrix if isinstance(layer, (Conv1D, nn.Embedding)) else matrix.T
    if tuple(matrix.shape) != chain.size:
        raise _mismatch(chain, f"a weight of {tuple(matrix.shape)}")
    return matrix


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return the adapted layers of a `PeftModel` by their name in the base model."""
    return {
        ".".join(part for part in name.split(".")[2:] if part != "base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def _mismatch(chain: SavedChain, got: str) -> InputError:
    return InputError(
        f"--model, {chain.module}",
        expected=f"a layer with a weight of {chain.size} in the base model",
        got=got,
        do="name the model that the adapter was trained on",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the audit: transformers tells of every file it opens."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
