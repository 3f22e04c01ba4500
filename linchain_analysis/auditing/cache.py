"""Leading singular vectors of base weights, computed once and kept on disk under a hash of the weight.

The folder is `$LINCHAIN_CACHE`, or ~/.cache/linchain_analysis. Whatever is in it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from linchain_analysis.measures.subspaces import Directions, drop_arbitrary

_FORM = "1"  # of an entry; part of its name, so that a later form never reads an earlier one


_PARTS = ("left", "sigma", "right")


def cache_folder() -> Path:
    """Return where entries are kept."""
    chosen = os.environ.get("LINCHAIN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "linchain_analysis"


def hash_weight(weight: torch.Tensor) -> str:
    """Return the BLAKE2b hash of dtype, shape and bytes of a weight."""
    found = hashlib.blake2b(digest_size=20)
    found.update(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    # As bytes, because NumPy has no bfloat16.
    found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def leading_vectors_of(
    weight: torch.Tensor, num_vectors: int, seed: int, compute: Callable[[], Directions]
) -> Directions:
    """Return the entry of a weight, or compute and keep it.

    An entry that is damaged, or that an interrupted writer left, is computed again; a folder that cannot be written is
    no fault.

    Args:
        weight: What the entry belongs to, in any dtype.
        num_vectors: K.
        seed: Of the randomised decomposition.
        compute: Returns the K leading triplets.

    Returns:
        The triplets, their vectors rounded to float32, in which they are kept.
    """
    name = f"svd{_FORM}-{hash_weight(weight)}-{num_vectors}-{seed}.safetensors"
    path = cache_folder() / name
    kept = _read(path)
    if kept is None:
        found = compute()
        dtypes = {"left": np.float32, "sigma": np.float64, "right": np.float32}
        kept = {part: np.ascontiguousarray(getattr(found, part), dtype=dtype) for part, dtype in dtypes.items()}
        _write(path, kept)
    return drop_arbitrary(*(kept[part].astype(np.float64) for part in _PARTS))


def _checksum(arrays: dict[str, NDArray[np.floating]]) -> str:
    found = hashlib.blake2b(digest_size=20)
    for part in _PARTS:
        found.update(f"{arrays[part].shape}".encode())
        found.update(arrays[part].tobytes())
    return found.hexdigest()


def _read(path: Path) -> dict[str, NDArray[np.floating]] | None:
    try:
        with safe_open(path, framework="np") as file:
            arrays = {part: file.get_tensor(part) for part in _PARTS}
            said = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return None
    return arrays if said == _checksum(arrays) else None


def _write(path: Path, arrays: dict[str, NDArray[np.floating]]) -> None:
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        os.close(handle)
        save_file(arrays, part, metadata={"checksum": _checksum(arrays)})
        Path(part).replace(path)
    except OSError:
        if part is not None:
            Path(part).unlink(missing_ok=True)
