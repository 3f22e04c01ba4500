"""A finished PEFT adapter in its folder: which matrices it changes, and the factors of each, read when asked for.

Only `adapter_config.json` and `adapter_model.safetensors` are opened. Neither can run code, which a pickled
`adapter_model.bin` can.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from linchain_analysis.adapters.methods import method_name
from linchain_analysis.auditing.refusals import CHAIN_TYPES, find_other_changes, find_refusal
from linchain_analysis.errors import InputError
from linchain_analysis.measures.spectral import Array

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# As PEFT writes them, behind the name of the layer: lora_A.weight, or lora_A.A and lora_A.W1 … of a chain, or for
# embeddings lora_embedding_A without anything behind it.
_FACTOR = re.compile(
    r"(?P<layer>.+?)\.lora_(?P<embedding>embedding_)?(?:A(?:\.(?:weight|A))?|(?:A|W)\.(?P<inner>W\d+)|(?P<last>B)(?:\.weight)?)"
)


@dataclass(frozen=True)
class SavedChain:
    """One adapted matrix of a saved adapter, without its numbers.

    Attributes:
        module: Name of the layer in the base model.
        kind: Last part of the name.
        layer: Index of the layer's block (the first number in the name), or None.
        factors: A, W1 … Wn, B, from input to output, each with its key in the file.
        shapes: Of the factors in chain view: (d_in, w_0), (w_{i-1}, w_i), …, (w_n, d_out).
        scale: What multiplies their product.
        epsilon: Machine epsilon of the dtype they are stored in.
        refused: Why delta is not the product, or None where it is.
    """

    module: str
    kind: str
    layer: int | None
    factors: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, int], ...]
    scale: float
    epsilon: float
    refused: str | None

    @property
    def size(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.shapes[0][0], self.shapes[-1][1]

    @property
    def rank_bound(self) -> int:
        """The smallest of all widths: how many singular values the product can have."""
        return min(min(shape) for shape in self.shapes)


@dataclass(frozen=True)
class SavedAdapter:
    """A finished adapter.

    Attributes:
        name: What tells it from the others of one audit.
        path: Its folder.
        config: What `adapter_config.json` says.
        chains: Its adapted matrices, in the order of their names, numbers as numbers; none where it is not made of
            chains.
        tensors: Shape of every tensor of the file.
        refused: Why its delta is not a product of factors, or None.
        others: What it changes beyond its chains.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    chains: tuple[SavedChain, ...]
    tensors: Mapping[str, tuple[int, ...]]
    refused: str | None
    others: tuple[str, ...]

    @property
    def type(self) -> str:
        """PEFT's name of the method."""
        return str(self.config["peft_type"])

    @property
    def method(self) -> str:
        """The method's name, such as `lora-8` or `linchain-3-8`, as the tracker writes it into a run."""
        return method_name(self.config)

    def read(self, chain: SavedChain) -> tuple[Array, ...]:
        """Return A (d_in, w_0), W1 … Wn and B (w_n, d_out) of one matrix as float64, which every stored value is."""
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            stored = [file.get_tensor(key) for _, key in chain.factors]
        return tuple(tensor.to(torch.float64).flatten(1).numpy().T.astype(np.float64) for tensor in stored)


def read_adapter(folder: Path, name: str | None = None) -> SavedAdapter:
    """Read what an adapter's folder holds; numbers stay in the file.

    Raises:
        InputError: There is no adapter, only a pickled one, or its two files do not belong together.
    """
    _refuse_pickle(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            dtypes = {key: file.get_slice(key).get_dtype() for key in tensors}
    except (SafetensorError, OSError) as error:
        raise InputError(
            str(path), expected="a safetensors file", got=str(error) or "none", do="save the adapter again"
        ) from error
    refused = find_refusal(config, tensors)
    chains: tuple[SavedChain, ...] = ()
    used: set[str] = set()
    if str(config["peft_type"]) in CHAIN_TYPES:
        found = _group_factors(tensors)
        used = {key for factors in found.values() for _, key in factors}
        names = _module_names(list(found))
        chains = tuple(
            _describe(folder, config, layer, names[layer], factors, tensors, dtypes, refused)
            for layer, factors in sorted(found.items(), key=lambda item: natural_key(names[item[0]]))
        )
    others = find_other_changes(config, [key for key in tensors if key not in used]) if chains else ()
    return SavedAdapter(name or folder.resolve().name, folder, config, chains, tensors, refused, others)


def natural_key(text: str) -> list[tuple[str, int]]:
    """Return a sort key under which checkpoint-200 stands before checkpoint-1000, and layer 2 before layer 10."""
    return [(words, int(digits or 0)) for words, digits in re.findall(r"([^\d]*)(\d*)", text)]


def _refuse_pickle(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).is_file():
        raise InputError(
            str(folder),
            expected=WEIGHTS,
            got=f"only {PICKLE}, a pickle, which can run code when it is opened",
            do="convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            f"'{WEIGHTS}'), or load it with PEFT and save_pretrained it again",
        )
    raise InputError(str(folder), expected=f"{CONFIG} and {WEIGHTS}", got=f"no {WEIGHTS}", do="check the path")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            str(path), expected="the configuration of a PEFT adapter", got=str(error), do="check the path"
        ) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(
            str(path), expected="a JSON object with peft_type", got="none", do="save the adapter with save_pretrained"
        )
    return config


def _group_factors(keys: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the factors of each layer, from input to output, as (name, key)."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match:
            factor = match["inner"] or match["last"] or "A"
            found.setdefault(match["layer"], {})[factor] = key
    return {layer: sorted(factors.items(), key=lambda item: _position(item[0])) for layer, factors in found.items()}


def _position(factor: str) -> float:
    return {"A": 0.0, "B": math.inf}.get(factor) if factor in "AB" else float(factor[1:])  # type: ignore[return-value]


def _module_names(layers: Sequence[str]) -> dict[str, str]:
    """Return the name in the base model of each layer; PEFT's own `base_layer` stays only where names would collide."""
    plain = {layer: layer.removeprefix(_PREFIX) for layer in layers}
    short = {layer: ".".join(part for part in name.split(".") if part != "base_layer") for layer, name in plain.items()}
    counts: dict[str, int] = {}
    for name in short.values():
        counts[name] = counts.get(name, 0) + 1
    return {layer: name if counts[name] == 1 else plain[layer] for layer, name in short.items()}


def _describe(
    folder: Path,
    config: Mapping[str, Any],
    layer: str,
    module: str,
    factors: list[tuple[str, str]],
    tensors: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    refused: str | None,
) -> SavedChain:
    names = [name for name, _ in factors]
    place = f"{folder / WEIGHTS}, {module}"
    if names != ["A", *(f"W{i}" for i in range(1, len(names) - 1)), "B"]:
        raise InputError(place, expected="the factors A, W1 … Wn, B", got=", ".join(names), do="save the adapter again")
    stored = [tensors[key] for _, key in factors]
    if any(len(shape) < 2 or 0 in shape for shape in stored):
        raise InputError(
            place, expected="whole matrices", got=f"shapes {stored}", do="gather sharded weights before saving"
        )
    shapes = tuple((math.prod(shape[1:]), shape[0]) for shape in stored)
    rank, alpha = _pattern(config, layer)
    if refused is None:
        refused = _refuse_shapes(place, shapes, rank, config)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    epsilon = max(_EPSILON.get(dtypes[key], float(np.finfo(np.float32).eps)) for _, key in factors)
    parts = module.split(".")
    block = next((int(part) for part in parts if part.isdigit()), None)
    return SavedChain(module, parts[-1], block, tuple(factors), shapes, scale, epsilon, refused)


def _pattern(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """Return rank and alpha of a layer, by PEFT's own matching of patterns."""
    # PEFT matches with the name the layer had when it was adapted: the output projection inside an attention module
    # comes with that module, and a parameter with its own name.
    key = layer.removeprefix(_PREFIX).partition(".base_layer")[0]
    parameters = [name for name in config.get("target_parameters") or () if f".{key}.".endswith(_owner(name))]
    if len(parameters) == 1:
        key = f"{key}.{parameters[0].rpartition('.')[2]}"
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), key), config["r"])
    return int(rank), float(alphas.get(get_pattern_key(alphas.keys(), key), config["lora_alpha"]))


def _owner(parameter: str) -> str:
    return f".{parameter.rpartition('.')[0]}."


def _refuse_shapes(place: str, shapes: Sequence[tuple[int, int]], rank: int, config: Mapping[str, Any]) -> str | None:
    width, last = shapes[0][1], shapes[-1][0]
    if width % rank == 0 and width > rank and config.get("target_parameters"):
        return f"{width // rank} experts in one parameter, whose change is not one product of factors"
    before = shapes[-2][1]
    if width == rank and last < before and before % last == 0:
        return f"a convolution in {before // last} groups, which changes block by block, not by one product of factors"
    fits = all(left[1] == right[0] for left, right in pairwise(shapes))
    if width != rank or not fits:
        raise InputError(
            place,
            expected=f"factors of rank {rank} that fit each other, as {CONFIG} says",
            got=f"shapes {list(shapes)}",
            do="check that the two files belong together",
        )
    return None


_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7, "F8_E4M3": 2.0**-3, "F8_E5M2": 2.0**-2}
