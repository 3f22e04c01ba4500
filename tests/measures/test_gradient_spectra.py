from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain_cores import SHAPES, Shape, every_shape, random_chain, small_cores

from linchain_analysis.measures.gradient_spectra import measure_gradient_spectra
from linchain_analysis.measures.spectral import effective_rank

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@every_shape
def test_both_columns_against_the_full_gradients(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    chains = [random_chain(rng, shape) for _ in range(2)]
    values = measure_gradient_spectra(small_cores(chains)[0])
    longest = max(min(gradient.shape) for gradient in chains[0].gradient)
    assert values["grad_spectrum"].shape == (2, len(shape[1]) + 1, longest)
    for j, chain in enumerate(chains):
        for i, gradient in enumerate(chain.gradient):
            sigma = np.linalg.svd(gradient, compute_uv=False)
            expected = np.pad(sigma, (0, longest - len(sigma)))
            np.testing.assert_allclose(values["grad_spectrum"][j, i], expected, rtol=0, atol=1e-13 * sigma[0])
            share = sigma / sigma.sum()
            rank = np.exp(-(share * np.log(share)).sum())
            assert values["grad_effective_rank"][j, i] == pytest.approx(rank, rel=1e-10)


def test_a_gradient_of_rank_one() -> None:
    """One token gives every factor a gradient of rank one."""
    rng = np.random.default_rng(1)
    chain = random_chain(rng, SHAPES["8-16-8"])
    for gradient in chain.gradient:
        gradient[:] = np.outer(rng.standard_normal(len(gradient)), rng.standard_normal(gradient.shape[1]))
    values = measure_gradient_spectra(small_cores([chain])[0])
    norms = [[np.linalg.norm(gradient) for gradient in chain.gradient]]
    np.testing.assert_allclose(values["grad_spectrum"][..., 0], norms, rtol=1e-12)
    # The entropy of rounding, 1e-16 of σ₁ in each of up to 7 other directions, is below 1e-13.
    np.testing.assert_allclose(values["grad_effective_rank"], 1, rtol=1e-12)


def test_missing_broken_and_zero_gradients() -> None:
    rng = np.random.default_rng(2)
    chains = [random_chain(rng, SHAPES["n=2"]) for _ in range(3)]
    cores, _ = small_cores(chains)
    assert cores.gradient is not None
    whole = measure_gradient_spectra(cores)
    gradient = [g.copy() for g in cores.gradient]
    gradient[1][0] = np.nan  # no gradient
    gradient[0][1] = 0
    gradient[-1][2, 0, 0] = np.inf
    values = measure_gradient_spectra(replace(cores, gradient=tuple(gradient)))
    expected = whole["grad_spectrum"].copy()
    expected[0, 1], expected[1, 0], expected[2, -1] = np.nan, 0, np.nan
    np.testing.assert_array_equal(values["grad_spectrum"], expected)
    undefined = np.zeros((3, 4), dtype=bool)
    undefined[0, 1] = undefined[1, 0] = undefined[2, -1] = True
    np.testing.assert_array_equal(np.isnan(values["grad_effective_rank"]), undefined)
    np.testing.assert_array_equal(values["grad_effective_rank"], effective_rank(expected))
    none = measure_gradient_spectra(replace(cores, gradient=None))
    assert none["grad_spectrum"].shape == whole["grad_spectrum"].shape
    assert np.isnan(none["grad_spectrum"]).all()
    assert np.isnan(none["grad_effective_rank"]).all()
