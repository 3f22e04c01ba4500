"""Snapshots of small cores: what measures are computed from, kept so that later measures run on earlier runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from linchain_analysis.errors import DamageError
from linchain_analysis.measures.cores import Cores, TokenParts
from linchain_analysis.runs.reader import Run

_PER_FACTOR = ("before", "change", "gradient", "start", "since_start")
_PER_CHAIN = ("scale", "start_scale", "learning_rate", "trained", "base_norm")
_WHOLE = "whole_gradient/"
_ALWAYS = {"epsilon", "scale", "before/0", "before/1", "change/0", "change/1"}


@dataclass(frozen=True)
class Snapshot:
    """Chains of one shape at one step.

    Attributes:
        step: The step.
        modules: Names of the k modules.
        cores: They themselves in small coordinates.
        whole_gradients: Per module and factor the gradient in chain view, where the run kept it.
    """

    step: int
    modules: list[str]
    cores: Cores
    whole_gradients: Mapping[str, Mapping[str, NDArray[np.floating]]]


def pack_chain(cores: Cores, j: int, whole_gradients: Mapping[str, NDArray[np.floating]] | None = None) -> bytes:
    """Return everything known of chain `j` as the bytes of a safetensors file, exact."""
    parts: dict[str, NDArray[Any]] = {
        "size": np.array(cores.size, dtype=np.int64),
        "epsilon": np.array([cores.epsilon]),
    }
    for name in _PER_FACTOR:
        for i, factor in enumerate(getattr(cores, name) or ()):
            parts[f"{name}/{i}"] = factor[j]
    for name in _PER_CHAIN:
        value = getattr(cores, name)
        if value is not None:
            parts[name] = np.atleast_1d(value[j])
    for i, pair in enumerate(cores.start_squares):
        parts[f"start_squares/{i}/0"], parts[f"start_squares/{i}/1"] = pair[0][j], pair[1][j]
    if cores.tokens is not None:
        for part in fields(TokenParts):
            parts[f"tokens/{part.name}"] = np.atleast_1d(getattr(cores.tokens, part.name)[j])
    for name, gradient in (whole_gradients or {}).items():
        parts[f"{_WHOLE}{name}"] = gradient
    packed: bytes = save({name: np.ascontiguousarray(part) for name, part in parts.items()})
    return packed


def unpack_chains(packed: Sequence[bytes]) -> tuple[Cores, list[dict[str, NDArray[np.floating]]]]:
    """Return chains of one shape that `pack_chain` made, stacked, and the whole gradients of each."""
    parts = [load(one) for one in packed]

    def stacked(name: str) -> Any:
        return np.stack([part[name] for part in parts])

    def per_factor(name: str) -> Any:
        present = [i for i in range(len(parts[0])) if f"{name}/{i}" in parts[0]]
        return tuple(stacked(f"{name}/{i}") for i in present) or None

    def per_chain(name: str) -> Any:
        if name not in parts[0]:
            return None
        value = stacked(name)
        return value if name in ("learning_rate", "trained") else value[:, 0]

    squares = sum(name.startswith("start_squares/") for name in parts[0]) // 2
    tokens = None
    if "tokens/num_tokens" in parts[0]:
        values = {part.name: stacked(f"tokens/{part.name}") for part in fields(TokenParts)}
        tokens = TokenParts(**{name: value if name == "inputs" else value[:, 0] for name, value in values.items()})
    cores = Cores(
        **{name: per_factor(name) for name in _PER_FACTOR},
        **{name: per_chain(name) for name in _PER_CHAIN},
        size=(int(parts[0]["size"][0]), int(parts[0]["size"][1])),
        epsilon=float(parts[0]["epsilon"][0]),
        start_squares=tuple((stacked(f"start_squares/{i}/0"), stacked(f"start_squares/{i}/1")) for i in range(squares)),
        tokens=tokens,
    )
    whole = [{name.removeprefix(_WHOLE): v for name, v in part.items() if name.startswith(_WHOLE)} for part in parts]
    return cores, whole


def read_snapshots(run: Run) -> Iterator[Snapshot]:
    """Yield the snapshots of a run, step by step and, within a step, shape by shape.

    Raises:
        DamageError: What is stored is not what was written.
    """
    table = run.read("snapshots")
    for _, rows in table.groupby("step", sort=True):
        by_shape: dict[object, list[tuple[str, bytes]]] = defaultdict(list)
        for module, packed in zip(rows["module"].astype(str), rows["tensors"], strict=True):
            by_shape[_shapes(packed, run)].append((module, packed))
        for members in by_shape.values():
            modules = [module for module, _ in members]
            cores, whole = unpack_chains([packed for _, packed in members])
            yield Snapshot(int(rows["step"].iloc[0]), modules, cores, dict(zip(modules, whole, strict=True)))


def _shapes(packed: bytes, run: Run) -> object:
    """What has to agree for chains to be stacked."""
    try:
        parts = load(packed)
        size = tuple(int(length) for length in parts["size"])
        missing = _ALWAYS - set(parts)
    except Exception as error:
        raise _damaged(run, repr(error)) from error
    if missing:
        raise _damaged(run, f"one without {', '.join(sorted(missing))}")
    return size, tuple(sorted((n, p.shape) for n, p in parts.items() if not n.startswith(_WHOLE)))


def _damaged(run: Run, what: str) -> DamageError:
    return DamageError(
        str(run.path), expected="snapshots as they were written", got=what, do="restore the run from a copy"
    )
