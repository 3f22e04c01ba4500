from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.errors import InputError
from linchain_analysis.measures.noise import GradientNoise, gradient_noise, smooth

squares = st.floats(1e-6, 1e6)
sizes = st.integers(1, 10_000)


def test_values_computed_by_hand() -> None:
    # |G|² = 4 and tr Σ = 48: E|G_8|² = 4 + 6, E|G_32|² = 4 + 1.5
    noise = gradient_noise(10.0, 5.5, 8, 32)
    assert noise.gradient_square == pytest.approx(4)
    assert noise.noise_trace == pytest.approx(48)
    assert noise.scale == pytest.approx(12)


@given(squares, squares, sizes, sizes, squares)
def test_expected_norms_give_back_what_they_were_made_of(g: float, trace: float, b: int, more: int, c: float) -> None:
    big = b + more
    of_small, of_big = g + trace / b, g + trace / big
    noise = gradient_noise(of_small, of_big, b, big)
    # The squares are rounded, and multiplied by at most these factors.
    rounding = 1e-15 * of_small
    assert noise.gradient_square == pytest.approx(g, rel=1e-12, abs=rounding * (1 + 2 * b / more))
    assert noise.noise_trace == pytest.approx(trace, rel=1e-12, abs=rounding * 4 * b * big / more)
    # Scaling the loss scales both parts alike; the noise scale is in examples.
    scaled = gradient_noise(of_small * c, of_big * c, b, big)
    assert scaled.gradient_square == pytest.approx(
        noise.gradient_square * c, rel=1e-9, abs=c * rounding * 4 * big / more
    )


def test_estimates_are_unbiased() -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 2.0])
    gradients = mean + deviation * rng.standard_normal((4000, 16, 3))  # steps, examples, parameters
    micro = gradients.reshape(4000, 4, 4, 3).mean(axis=2)
    noise = gradient_noise((micro**2).sum(-1).mean(-1), (gradients.mean(1) ** 2).sum(-1), 4, 16)
    # An independent way to tr Σ: the sample variance of the examples of each step.
    for estimate, truth in ((noise.gradient_square, mean @ mean), (noise.noise_trace, deviation @ deviation)):
        deviation_of_mean = estimate.std() / np.sqrt(len(estimate))
        assert abs(estimate.mean() - truth) < 4 * deviation_of_mean  # a fixed seed; one in 16 000 would fail
    dense = gradients.var(axis=1, ddof=1).sum(-1)
    assert noise.noise_trace.mean() == pytest.approx(dense.mean(), rel=0.05)
    averaged = smooth(noise, decay=0.999).scale[-1]
    assert averaged == pytest.approx(deviation @ deviation / (mean @ mean), rel=0.1)


def test_undefined_scales_are_nan() -> None:
    # No signal: |G_B|² falls as 1/B or faster, so that |G|² is estimated as 0 or below.
    noise = gradient_noise([8.0, 8.0, np.nan, np.inf, 0.0, 5.0], [2.0, 1.0, 1.0, 1.0, 0.0, 6.0], 1, 4)
    np.testing.assert_allclose(noise.gradient_square[:2], [0, -4 / 3], atol=1e-15)
    np.testing.assert_array_equal(np.isnan(noise.scale), [True, True, True, True, True, False])
    assert noise.scale[5] < 0  # noise of the estimate, left in so that averages stay unbiased


def test_averages_are_of_both_parts_and_pass_over_holes() -> None:
    g, s = np.array([1.0, np.nan, 3.0, 2.0]), np.array([4.0, 7.0, 2.0, np.inf])
    out = smooth(GradientNoise(g, s), decay=0.5)
    np.testing.assert_allclose(out.gradient_square, [1, 1, (0.5 * 1 + 3) / 1.5, 3.5 / 1.5], rtol=1e-15)
    np.testing.assert_allclose(out.noise_trace, [4, 4, (0.5 * 4 + 2) / 1.5, 4 / 1.5], rtol=1e-15)
    np.testing.assert_allclose(out.scale, [4, 4, 4 / 3.5, 4 / 3.5], rtol=1e-15)
    first = smooth(GradientNoise(np.array([np.nan, 1.0]), np.array([1.0, 2.0])))
    np.testing.assert_array_equal(first.scale, [np.nan, 2.0])


@given(st.floats(0, 0.999), st.integers(1, 30), st.integers(0, 2**32))
def test_averages_are_the_weighted_sums_that_they_say(decay: float, steps: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((2, 3, steps))
    out = smooth(GradientNoise(values[0], values[1]), decay=decay)
    weights = decay ** np.arange(steps)[::-1]
    expected = (values * weights).sum(-1) / weights.sum()
    np.testing.assert_allclose(out.gradient_square[:, -1], expected[0], atol=1e-12)
    np.testing.assert_allclose(out.noise_trace[:, -1], expected[1], atol=1e-12)
    constant = smooth(GradientNoise(np.full(steps, 0.1), np.full(steps, 0.7)), decay=decay)
    np.testing.assert_array_equal(constant.scale, 0.7 / 0.1)


@pytest.mark.parametrize(("small", "big"), [(8, 8), (16, 8), (0, 8), (8, np.inf), ([1, 9], 8)])
def test_one_batch_size_is_refused(small: float, big: float) -> None:
    with pytest.raises(InputError, match="small_batch < big_batch"):
        gradient_noise(1.0, 1.0, small, big)


def test_wrong_averages_are_refused() -> None:
    with pytest.raises(InputError, match=r"decay: expected a number in \[0, 1\), got 1"):
        smooth(gradient_noise([2.0], [1.0], 1, 2), decay=1.0)
    with pytest.raises(InputError, match="an axis of steps"):
        smooth(gradient_noise(2.0, 1.0, 1, 2))
