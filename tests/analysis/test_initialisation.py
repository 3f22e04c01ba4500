"""Spectra of chains as they start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from linchain_analysis.analysis.initialisation import (
    KEYS,
    QUANTITIES,
    measure_initial_chains,
    summarise_initial_chains,
)
from linchain_analysis.errors import InputError
from linchain_analysis.measures.theory.initial_factors import draw_first_factor, draw_inner_factors
from linchain_analysis.method_names import CHAIN_INITS, UNIFORM_GAINS


def select(table: pd.DataFrame, **setting: Any) -> pd.DataFrame:
    return table[(table[list(setting)] == pd.Series(setting)).all(axis=1)].reset_index(drop=True)


def test_a_row_against_the_dense_product() -> None:
    """The whole A, not its R, and one chain at a time."""
    table = measure_initial_chains(d_in=50, ranks=(4,), lengths=(3,), inits=("he",), widths=(6,), num_draws=2, seed=5)
    assert list(table.columns) == [*KEYS, "seed", "draw", *QUANTITIES]
    for draw, row in table.iterrows():
        product = draw_first_factor(50, 4, np.random.default_rng([5, 4, draw]))
        for factor in draw_inner_factors((4, 6, 6, 4), "he", np.random.default_rng([5, 4, draw, 4, 6, 6, 4])):
            product = product @ factor
        sigma = np.linalg.svd(product, compute_uv=False)
        p = sigma / sigma.sum()
        assert (row["init"], row["d_in"], row["rank"], row["chain_width"], row["chain_length"]) == ("he", 50, 4, 6, 3)
        expected = {
            "largest_sigma": sigma[0],
            "smallest_sigma": sigma[-1],
            "condition_number": sigma[0] / sigma[-1],
            "effective_rank": math.exp(-(p * np.log(p)).sum()),
            "mean_square": (product**2).sum() / 4,
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-12 * expected["condition_number"]), name


def test_one_row_for_each_draw_of_each_setting() -> None:
    table = measure_initial_chains(d_in=20, ranks=(2, 3), lengths=(0, 2), num_draws=4, widths=(None, 5))
    assert len(table) == 2 * 2 * 2 * len(CHAIN_INITS) * 4
    assert not table.duplicated([*KEYS, "draw"]).any()
    assert np.isfinite(table[list(QUANTITIES)]).all().all()
    pd.testing.assert_frame_equal(
        table, measure_initial_chains(d_in=20, ranks=(2, 3), lengths=(0, 2), num_draws=4, widths=(None, 5))
    )
    # A setting's numbers do not depend on which others are drawn beside it.
    alone = measure_initial_chains(d_in=20, ranks=(3,), lengths=(2,), inits=("lecun",), num_draws=4, widths=(5,))
    same = select(table, rank=3, chain_length=2, init="lecun", chain_width=5)
    pd.testing.assert_frame_equal(same, alone)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return measure_initial_chains(d_in=256, ranks=(8,), lengths=range(5), num_draws=60)


def test_without_inner_factors_the_inits_are_one(table: pd.DataFrame) -> None:
    for init in CHAIN_INITS:
        for name in QUANTITIES:
            np.testing.assert_array_equal(
                select(table, init=init, chain_length=0)[name], select(table, init="kaiming", chain_length=0)[name]
            )


def test_uniform_inits_differ_in_scale_alone(table: pd.DataFrame) -> None:
    for length in range(5):
        kaiming = select(table, init="kaiming", chain_length=length)
        for init in ("he", "lecun"):
            other = select(table, init=init, chain_length=length)
            gain = (UNIFORM_GAINS[init] / UNIFORM_GAINS["kaiming"]) ** length
            np.testing.assert_allclose(other["largest_sigma"], gain * kaiming["largest_sigma"], rtol=1e-12)
            np.testing.assert_allclose(other["effective_rank"], kaiming["effective_rank"], rtol=1e-10)


def test_orthogonal_and_identity_keep_the_spectrum_of_a(table: pd.DataFrame) -> None:
    start = select(table, init="kaiming", chain_length=0)
    for init in ("orthogonal", "identity"):
        for length in range(1, 5):
            for name in QUANTITIES:
                np.testing.assert_allclose(select(table, init=init, chain_length=length)[name], start[name], rtol=1e-12)


@pytest.mark.parametrize(("init", "gain_square"), [("kaiming", 1 / 3), ("lecun", 1.0), ("he", 2.0)])
def test_the_scale_is_the_gain_to_the_length(table: pd.DataFrame, init: str, gain_square: float) -> None:
    """E of mean σ² is 1/3 · gain^2n, 3^−(n+1) for kaiming: E‖xW‖² = gain² ‖x‖² for each factor."""
    for length in range(5):
        squares = select(table, init=init, chain_length=length)["mean_square"]
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - gain_square**length / 3) < 4 * error


def test_longer_gaussian_like_chains_are_worse_conditioned(table: pd.DataFrame) -> None:
    medians = summarise_initial_chains(table)
    condition = select(medians, quantity="condition_number", init="kaiming")["median"]
    rank = select(medians, quantity="effective_rank", init="kaiming")["median"]
    assert (np.diff(np.log(condition)) > 0.5).all()
    assert (np.diff(rank) < 0).all()
    # Independent of this code: medians by another implementation for d_in = 1024, few draws, so a factor of 2.
    np.testing.assert_allclose(np.log(condition[1:]), np.log([22, 170, 1600, 3700]), rtol=0, atol=math.log(2))
    np.testing.assert_allclose(rank, [7.99, 6.40, 5.40, 4.57, 4.06], rtol=0.05)


def test_widths() -> None:
    table = measure_initial_chains(d_in=64, ranks=(8,), lengths=(1, 2), widths=(None, 16, 3), num_draws=60)
    medians = summarise_initial_chains(table).set_index(["quantity", "init", "chain_width", "chain_length"])["median"]
    # A wider middle conditions a Gaussian-like chain better: 8-16-8 against 8-8-8.
    assert medians["condition_number", "kaiming", 16, 2] < 0.5 * medians["condition_number", "kaiming", 8, 2]
    assert medians["effective_rank", "kaiming", 16, 2] > medians["effective_rank", "kaiming", 8, 2]
    # Orthonormal rows times orthonormal columns are no orthogonal matrix: that init loses its conditioning there.
    assert medians["condition_number", "orthogonal", 16, 2] > 3
    assert medians["condition_number", "orthogonal", 8, 2] < 2
    # A narrower middle is measured over its own width.
    narrow = select(table, chain_width=3, chain_length=2)
    assert np.isfinite(narrow["condition_number"]).all()
    assert (narrow["effective_rank"] <= 3).all()
    # One inner factor has no width between.
    for name in QUANTITIES:
        one, other = (select(table, chain_width=width, chain_length=1)[name] for width in (8, 16))
        np.testing.assert_array_equal(one, other)


def test_quantiles_by_hand() -> None:
    keys = {"init": "kaiming", "d_in": 4, "rank": 2, "chain_width": 2, "chain_length": 1}
    table = pd.DataFrame({**keys, "draw": range(21), **{name: np.arange(21.0) for name in QUANTITIES}})
    summary = summarise_initial_chains(table, ["effective_rank"])
    assert list(summary.columns) == ["quantity", *KEYS, "median", "low", "high", "num_draws"]
    (row,) = summary.to_dict("records")
    assert (row["median"], row["low"], row["high"], row["num_draws"]) == (10, 1, 19, 21)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"d_in": 0}, {"ranks": (0,)}, {"lengths": (-1,)}, {"widths": (0,)}, {"num_draws": 0}),
        *({"ranks": ()}, {"lengths": ()}, {"widths": ()}, {"inits": ()}),
    ],
)
def test_sizes_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="sizes and draws of 1 at least"):
        measure_initial_chains(**wrong)


def test_an_unknown_init() -> None:
    with pytest.raises(InputError, match="got 'xavier'"):
        measure_initial_chains(inits=("xavier",), num_draws=1)
