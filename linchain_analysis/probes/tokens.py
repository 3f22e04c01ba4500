"""Look at the inputs and output gradients of adapted layers in one backward pass, without keeping them.

Legend: X (t, d_in) the layer's inputs and D (t, d_out) the gradient of the loss with respect to its outputs, over t
tokens; G = XᵀD the gradient of the full weight, which is never kept; F_0 = A (d_in, w_0), F_i = W_i, F_{m-1} = B
(w_n, d_out) the factors; L_i = F_0 … F_{i-1} and R_i = F_{i+1} … F_{m-1}.

Hooks are on the layers for the steps that are looked at, and at no other time. Products with tokens are in float32 (in
float64 for float64 models), sums of their squares in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linchain_analysis.measures.cores import TokenParts
from linchain_analysis.measures.grams import coordinates_from_gram
from linchain_analysis.probes.chains import Chain
from linchain_analysis.probes.host import HostCopy, readable

logger = logging.getLogger("linchain_analysis")

_NUMBERS = ("gradient_square", "tangent_square", "preconditioned_dot", "preconditioned_square", "num_tokens")
_BLOCK = 1024  # columns of G, or rows of a token Gram matrix, at a time


class TokenProbe:
    """Sees the tokens of linear layers in the last backward pass before a step.

    Args:
        chains: Whose layers are looked at; those that are not linear maps of their inputs are left out.
        is_trained: Whether a parameter trains.

    Attributes:
        fault: The first exception in here, after which nothing is looked at any more.
    """

    def __init__(self, chains: Sequence[Chain], is_trained: Callable[[nn.Parameter], bool]) -> None:
        self._chains = list(chains)
        self._is_trained = is_trained
        self.fault: Exception | None = None
        self._handles: list[Any] = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # per chain its numbers (5,) and the Gram matrix of X A
        self._times: dict[int, int] = {}
        self._found: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    @property
    def armed(self) -> bool:
        """Whether the next backward pass will be looked at."""
        return bool(self._handles)

    def arm(self) -> None:
        """Look at every backward pass from now on."""
        if self.armed:
            return
        self._seen, self._times = {}, {}
        by_layer: dict[int, list[int]] = {}
        for index, chain in enumerate(self._chains):
            if chain.adapted is not None and chain.refused is None and _is_linear(chain):
                by_layer.setdefault(id(chain.adapted), []).append(index)
        for indices in by_layer.values():
            layer = self._chains[indices[0]].adapted
            assert layer is not None
            self._handles.append(layer.register_forward_hook(self._forward_hook(indices)))

    def disarm(self) -> None:
        """Take the hooks away; what was seen is forgotten with the next `arm`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin_backward(self) -> None:
        """Forget the backward pass before: each is a sum over other tokens."""
        self._seen, self._times = {}, {}

    def collect(self, gradient_scale: float = 1.0) -> None:
        """Bring what was seen to the host, gradients divided by `gradient_scale`."""
        copy = HostCopy()
        places = {
            index: [copy.reserve(tuple(part.shape), part.device).copy_(part) for part in parts]
            for index, parts in self._seen.items()
        }
        copy.fetch()
        fetched = {index: [copy.fetched(place) for place in pair] for index, pair in places.items()}
        power = np.array([2.0, 2.0, 2.0, 2.0, 0.0])
        self._found = {
            # A layer that was called twice has a gradient that is a sum, of which only the parts were seen.
            index: (
                fetched[index][0] / gradient_scale**power
                if self._times[index] == 1
                else np.full(len(_NUMBERS), np.nan),
                fetched[index][1],
            )
            for index in self._seen
        }
        self._seen = {}

    def forget(self) -> None:
        """Drop what was collected: the next step is not looked at."""
        self._found = {}

    def parts(self, members: NDArray[np.int_]) -> TokenParts | None:
        """Return what was collected of the chains at these positions, NaN for those not seen; None if none was."""
        found = [self._found.get(int(member)) for member in members]
        width = next((len(one[1]) for one in found if one is not None), None)
        if width is None:
            return None
        numbers = np.stack([np.full(len(_NUMBERS), np.nan) if one is None else one[0] for one in found])
        grams = np.stack([np.full((width, width), np.nan) if one is None else one[1] for one in found])
        return TokenParts(**dict(zip(_NUMBERS, numbers.T, strict=True)), inputs=coordinates_from_gram(grams))

    def _forward_hook(self, indices: list[int]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            inputs = arguments[0] if arguments else None
            if not (isinstance(inputs, Tensor) and isinstance(output, Tensor) and output.requires_grad):
                return
            version = inputs._version
            held = inputs.detach()

            def see(gradient: Tensor) -> None:
                if held._version == version:  # else somebody wrote over the inputs since
                    self._see(indices, held, gradient)

            output.register_hook(see)  # type: ignore[no-untyped-call]

        return hook

    def _see(self, indices: list[int], inputs: Tensor, gradient: Tensor) -> None:
        """Look at one layer. It runs inside somebody's backward pass, where nothing may be raised."""
        try:
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                for index in indices:
                    self._times[index] = self._times.get(index, 0) + 1
                    chain = self._chains[index]
                    trained = [self._is_trained(factor.parameter) for factor in chain.factors]
                    self._seen[index] = look_at_tokens(chain, inputs, gradient, trained)
        except Exception as error:
            self.fault = error
            logger.warning("tracker: tokens are not looked at any more (%s: %s).", type(error).__name__, error)
            self.disarm()
            self._chains = []


def look_at_tokens(
    chain: Chain, inputs: Tensor, gradient: Tensor, trained: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Return ‖G‖², ‖Π_T G‖², ⟨G, P(G)⟩, ‖P(G)‖² and t as one tensor (5,), and the Gram matrix of X A (w_0, w_0).

    Args:
        chain: With its factors as they were in the forward pass.
        inputs: (…, d_in).
        gradient: (…, d_out).
        trained: Which factors train, all of them by default: T is spanned by these alone, and P sums over them.
    """
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    x = readable(inputs.detach()).reshape(-1, inputs.shape[-1]).to(wide)
    d = readable(gradient.detach()).reshape(-1, gradient.shape[-1]).to(wide)
    factors = [readable(factor.view(factor.parameter.detach())).double() for factor in chain.factors]
    first = factors[0]
    if not all(bool(factor.isfinite().all()) for factor in factors):
        return first.new_full((len(_NUMBERS),), torch.nan), first.new_full((first.shape[1],) * 2, torch.nan)
    trains = [True] * len(factors) if trained is None else list(trained)
    left: list[Tensor | None] = [None]  # L_i = F_0 … F_{i-1}, None for the identity
    for factor in factors[:-1]:
        left.append(factor if left[-1] is None else left[-1] @ factor)
    right: list[Tensor | None] = [None]  # R_i = F_{i+1} … F_{m-1}
    for factor in reversed(factors[1:]):
        right.insert(0, factor if right[0] is None else factor @ right[0])

    # P(G) = Σ L_i g_i R_i with g_i = L_iᵀ G R_iᵀ, kept as a sum of products of tall and flat matrices.
    tall, flat = [], []
    dot = torch.zeros((), dtype=torch.float64, device=x.device)
    for before, after in (pair for pair, train in zip(zip(left, right, strict=True), trains, strict=True) if train):
        xl = x if before is None else x @ before.to(wide)
        dr = d if after is None else d @ after.mT.to(wide)
        own = (xl.mT @ dr).double()  # g_i
        dot += _square(own)
        if after is not None:
            tall.append(own if before is None else before @ own)
            flat.append(after)
        else:
            tall.append(first if before is None else before)
            flat.append(own)
    preconditioned = dot
    if tall:
        columns, rows = torch.cat(tall, dim=1), torch.cat(flat, dim=0)
        preconditioned = ((columns.mT @ columns) * (rows @ rows.mT)).sum()
    count = torch.full_like(dot, float(len(x)))
    numbers = torch.stack(
        [gradient_square(x, d), _tangent_square(x, d, left, right, trains), dot, preconditioned, count]
    )
    xa = (x @ first.to(wide)).double()
    return numbers, xa.mT @ xa


def _tangent_square(
    x: Tensor, d: Tensor, left: Sequence[Tensor | None], right: Sequence[Tensor | None], trains: Sequence[bool]
) -> Tensor:
    """Return ‖Π_T G‖², T the span of {L_i D R_i} over the factors that train.

    From factor to factor the columns of L_i can only become fewer and the rows of R_i more. So T is the orthogonal sum,
    over the factors that train, of: the columns of L_i times those rows of R_i that no such factor before it had. With
    U_i, V_i orthonormal bases of both, ‖Π_T G‖² = Σ ‖U_iᵀ G V_i‖² − ‖U_iᵀ G V_{i'}‖², i' the one before.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    known: Tensor | None = None  # D V of the factor before
    for before, after, train in zip(left, right, trains, strict=True):
        if not train:
            continue
        xu = x if before is None else x @ _basis(before).to(x.dtype)
        dv = d if after is None else d @ _basis(after.mT).to(d.dtype)
        total += _square(xu.mT @ dv)
        if known is not None:
            total -= _square(xu.mT @ known)
        known = dv
    return total.clamp(min=0.0)


def gradient_square(x: Tensor, d: Tensor) -> Tensor:
    """Return ‖XᵀD‖², in float64, by whichever way is cheaper.

    Of few tokens by their Gram matrices, ⟨XXᵀ, DDᵀ⟩, in float64, since its terms cancel; of many from blocks of XᵀD.
    """
    tokens, d_in, d_out = len(x), x.shape[1], d.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    if 2 * tokens * (d_in + d_out) < d_in * d_out:
        x, d = x.double(), d.double()
        for start in range(0, tokens, _BLOCK):
            piece = slice(start, start + _BLOCK)
            total += ((x[piece] @ x.mT) * (d[piece] @ d.mT)).sum()
        return total
    for start in range(0, d_out, _BLOCK):
        total += _square(x.mT @ d[:, start : start + _BLOCK])
    return total


def _square(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix.double())
    return norm * norm


def _basis(matrix: Tensor) -> Tensor:
    """Orthonormal basis (d, w) of the columns of (d, w), zero columns for directions at rounding level."""
    q, r = torch.linalg.qr(matrix)
    left, sigma, _ = torch.linalg.svd(r)
    kept = sigma > max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigma.amax(dim=-1, keepdim=True)
    basis: Tensor = q @ left * kept
    return basis


def _is_linear(chain: Chain) -> bool:
    """Whether the layer multiplies its inputs by a matrix."""
    base = chain.adapted.get_base_layer() if chain.adapted is not None else None
    return isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
