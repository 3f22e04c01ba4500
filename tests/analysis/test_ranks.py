import numpy as np
import pytest
from synthetic_runs import FrameRuns, rows

from linchain_analysis.analysis.ranks import measure_ranks, measure_spectra


def test_spectra_of_different_lengths_are_padded_with_zeros() -> None:
    found = measure_spectra([[2.0, 2.0, 2.0], np.array([4.0], dtype=np.float32), [], [0.0, 0.0], [np.nan, 1.0]])
    np.testing.assert_allclose(found["effective_rank"], [3, 1, np.nan, np.nan, np.nan], rtol=1e-12)
    np.testing.assert_array_equal(found["moved"], [1, 1, 0, 0, 1])


def test_no_spectra_give_no_rows() -> None:
    assert measure_spectra([])["stable_rank"].shape == (0,)
    assert measure_ranks(FrameRuns()).empty
    light = FrameRuns(modules=rows("lora-16", 0, {"step": [1], "module": ["p"], "spectrum": [None]}))
    assert measure_ranks(light).empty


def test_ranks_by_hand() -> None:
    spike = [1.0] + [0.12] * 15
    table = {"step": 1, "module": ["flat", "spike", "still"], "spectrum": [[2.0, 2.0], spike, [0.0, 0.0]]}
    ranks = measure_ranks(FrameRuns(modules=rows("lora-16", 0, table))).set_index("module")
    assert list(ranks.index) == ["flat", "spike"]
    flat = ranks.loc["flat", ["effective_rank", "effective_rank_squared", "stable_rank", "num_directions"]]
    np.testing.assert_allclose(flat.to_numpy(dtype=float), 2.0, rtol=1e-12)
    assert ranks.loc["spike", "effective_rank"] == pytest.approx(10.9, abs=0.05)
    assert ranks.loc["spike", "stable_rank"] == pytest.approx(1 + 15 * 0.0144, rel=1e-12)
