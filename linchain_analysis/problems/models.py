"""Base models and tokenizers from a folder or the hub, and which of a model's layers to adapt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from linchain_analysis.errors import InputError

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def load_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Return a causal language model in evaluation mode, in `dtype` or float32.

    Raises:
        InputError: If there is no such model.
    """
    with _reading(name), _without_progress_bar():
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32).eval()


def load_tokenizer(name: str) -> Any:
    """Return a model's tokenizer, the end token being its padding token where it has none.

    Raises:
        InputError: If there is no such tokenizer, or one with neither padding nor end token.
    """
    with _reading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"model {name}",
                expected="a tokenizer with a padding or an end token",
                got="one with neither",
                do="add one to its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_context_length(name: str) -> int | None:
    """Return the number of positions that a model knows, None where its configuration does not say."""
    with _reading(name):
        config = AutoConfig.from_pretrained(name)
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def find_target_modules(name: str) -> tuple[str, ...]:
    """Return the last parts of the names of the layers to adapt.

    These are the paper's (query, key, value, up and down projections) where the model has them all, otherwise every
    linear layer except the head. No weights are read.

    Raises:
        InputError: If there is no such model, or it has no linear layer.
    """
    with _reading(name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    head = model.get_output_embeddings()
    kinds = dict.fromkeys(
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    )
    if not kinds:
        raise InputError(
            f"model {name}", expected="linear layers to adapt", got="none", do="choose a transformer language model"
        )
    return PAPER_TARGETS if set(PAPER_TARGETS) <= set(kinds) else tuple(kinds)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    looks_like_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count(os.sep) > 1
    if looks_like_path and not Path(name).is_dir():
        raise InputError(f"model {name}", expected="a folder with a model", got="no such folder", do="check the path")
    try:
        yield
    except (OSError, ValueError) as fault:
        raise InputError(
            f"model {name}",
            expected="a causal language model of transformers, in a folder or on the hub",
            got=f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}",
            do="check the name, or the connection for a model of the hub",
        ) from fault


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
