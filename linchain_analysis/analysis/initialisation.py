"""Singular values of A W1 … Wn as it starts, for every init, rank, length and width.

At the start B = 0 and only B moves: with L = A W1 … Wn, gradient descent moves ΔW by −lr · scale² · L Lᵀ G. So the
spectrum of L says how the first steps weigh the directions of the input, before anything has been learned. The output
side and d_in have next to no part in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from linchain_analysis.errors import InputError
from linchain_analysis.measures import spectral
from linchain_analysis.measures.spectral import Array
from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factors
from linchain_analysis.method_names import CHAIN_INITS, NamedMethod

KEYS = ["init", "d_in", "rank", "chain_width", "chain_length"]
QUANTITIES = ("largest_sigma", "smallest_sigma", "condition_number", "effective_rank", "mean_square")
QUANTILES = (0.05, 0.95)


def measure_initial_chains(
    d_in: int = 1024,
    ranks: Sequence[int] = (8, 16, 64),
    lengths: Iterable[int] = range(9),
    inits: Sequence[str] = CHAIN_INITS,
    widths: Sequence[int | None] | None = None,
    num_draws: int = 101,
    seed: int = 0,
) -> pd.DataFrame:
    """Draw chains as the adapters start them, and return the spectrum of A W1 … Wn of each in numbers.

    Draw k of one rank has the same A for every init, length and width, so that they differ in the inner factors only;
    draws of one length and width start from the same random numbers for every init.

    Args:
        d_in: Rows of A. Only R of A = QR is multiplied, so that it costs nothing further.
        ranks: r, the columns of A.
        lengths: n, numbers of inner factors; 0 is LoRA, for which the inits do not differ.
        inits: Of `method_names.CHAIN_INITS`.
        widths: Widths between inner factors, None for r; square chains alone by default. One inner factor has none,
            and stands in the table for each of them.
        num_draws: Draws of every setting.
        seed: Of all draws.

    Returns:
        One row per `init d_in rank chain_width chain_length seed draw`, with `largest_sigma smallest_sigma
        condition_number effective_rank mean_square` of the σ of the narrowest width, the last being the mean of σ².
        In float64 condition numbers hold two digits or more up to about 1e14.

    Raises:
        InputError: A size or a number of draws below 1, a length below 0, none of something, or an unknown init.
    """
    lengths = list(lengths)
    square = [None] if widths is None else list(widths)
    sizes = [*ranks, *(width for width in square if width is not None)]
    if min([d_in, num_draws, *sizes]) < 1 or min(lengths, default=0) < 0 or not all((ranks, lengths, inits, square)):
        raise InputError(
            "measure_initial_chains",
            expected="sizes and draws of 1 at least, lengths of 0 at least, and one of everything",
            got=f"d_in {d_in}, ranks and widths {sizes}, lengths {lengths}, {len(inits)} inits, {num_draws} draws",
            do="correct the number that is too small",
        )
    parts = []
    for rank in ranks:
        generators = [np.random.default_rng([seed, rank, draw]) for draw in range(num_draws)]
        first = np.stack([np.linalg.qr(draw_first_factor(d_in, rank, each), mode="r") for each in generators])
        for init in inits:
            for width in square:
                for length in lengths:
                    shape = NamedMethod("linchain", rank, length, width, init).widths
                    streams = [np.random.default_rng([seed, rank, draw, *shape]) for draw in range(num_draws)]
                    sigma = _initial_spectra(first, shape, init, streams)
                    identity = (init, d_in, rank, width or rank, length)
                    told = {**dict(zip(KEYS, identity, strict=True)), "seed": seed, "draw": range(num_draws)}
                    parts.append(pd.DataFrame({**told, **_describe(sigma)}))
    return pd.concat(parts, ignore_index=True)


def summarise_initial_chains(table: pd.DataFrame, quantities: Sequence[str] = QUANTITIES) -> pd.DataFrame:
    """Return median and 5 % and 95 % quantiles over draws of each quantity.

    Args:
        table: What `measure_initial_chains` returned, or that with more columns.
        quantities: Its columns to summarise.

    Returns:
        One row per `quantity` and setting, with `median low high num_draws`. low to high is where nine of ten draws
        lie, and no interval of the median.
    """
    long = table.melt(id_vars=KEYS, value_vars=list(quantities), var_name="quantity")
    grouped = long.groupby(["quantity", *KEYS], sort=False)["value"]
    return pd.DataFrame(
        {
            "median": grouped.median(),
            "low": grouped.quantile(QUANTILES[0]),
            "high": grouped.quantile(QUANTILES[1]),
            "num_draws": grouped.size(),
        }
    ).reset_index()


def _initial_spectra(first: Array, widths: tuple[int, ...], init: str, streams: Sequence[np.random.Generator]) -> Array:
    """Singular values (draws, narrowest width) of R W1 … Wn."""
    product = first
    inner = [draw_inner_factors(widths, init, stream) for stream in streams]
    for factors in zip(*inner, strict=True):
        product = product @ np.stack(factors)
    return spectral.spectrum(product)[:, : min(widths)]


def _describe(sigma: Array) -> dict[str, Array]:
    rank = sigma.shape[-1]
    return {
        "largest_sigma": sigma[:, 0],
        "smallest_sigma": sigma[:, -1],
        "condition_number": spectral.condition_number(sigma),
        "effective_rank": spectral.effective_rank(sigma),
        "mean_square": np.asarray((sigma**2).sum(axis=-1) / rank),
    }
