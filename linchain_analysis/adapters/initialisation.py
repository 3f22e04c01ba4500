"""How the inner factors of a chain start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from linchain_analysis.method_names import UNIFORM_GAINS

# torch is told the gain g of `UNIFORM_GAINS` as the slope a of a leaky ReLU: g² = 2 / (1 + a²).
_UNIFORM_SLOPES = {init: math.sqrt(abs(round(2 / gain**2 - 1, 12))) for init, gain in UNIFORM_GAINS.items()}


def draw_inner_factors(widths: Sequence[int], init: str, seed: int) -> list[Tensor]:
    """Draw W1 … Wn, stored like `nn.Linear`: shape (w_i, w_{i-1}), float32, on the CPU.

    Args:
        widths: w_0 … w_n.
        init: One of `method_names.CHAIN_INITS`.
        seed: Seed of the stream they are drawn from; the global stream is left alone.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    factors = []
    for fan_in, fan_out in pairwise(widths):
        factor = torch.empty(fan_out, fan_in, device="cpu", dtype=torch.float32)
        if init == "identity":
            nn.init.eye_(factor)
        elif init == "orthogonal":
            nn.init.orthogonal_(factor, generator=generator)
        else:
            nn.init.kaiming_uniform_(factor, a=_UNIFORM_SLOPES[init], generator=generator)
        factors.append(factor)
    return factors


def seed_from(drawn: Tensor) -> int:
    """Derive a seed from a factor that the global stream has just drawn.

    So a chain is reproducible from the global seed without drawing from it: A, and everything drawn later, is what it
    would be for LoRA under that seed, and methods can be compared seed by seed.
    """
    sample = drawn.detach().flatten()[:4096].to("cpu", torch.float32).numpy()
    return int.from_bytes(hashlib.blake2b(sample.tobytes(), digest_size=8).digest(), "little") >> 1
