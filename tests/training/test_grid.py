from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.errors import InputError
from linchain_analysis.training import Grid
from linchain_analysis.training.grid import name_run


def test_a_grid_is_the_product_with_seeds_outermost() -> None:
    grid = Grid(methods=["lora-16", "linchain-3-16"], learning_rates=[1e-3, 0.01], seeds=range(2))
    assert [run.name for run in grid.runs(0.5)] == [
        "lora-16_lr0.001_seed0",
        "linchain-3-16_lr0.001_seed0",
        "lora-16_lr0.01_seed0",
        "linchain-3-16_lr0.01_seed0",
        "lora-16_lr0.001_seed1",
        "linchain-3-16_lr0.001_seed1",
        "lora-16_lr0.01_seed1",
        "linchain-3-16_lr0.01_seed1",
    ]


def test_a_seed_decides_initialisation_and_data_alike() -> None:
    runs = Grid(methods=["lora-8"], seeds=[4, 7]).runs(0.5)
    assert [(run.settings.init_seed, run.settings.data_seed) for run in runs] == [(4, 4), (7, 7)]


def test_without_learning_rates_the_default_names_the_run() -> None:
    assert [run.name for run in Grid(methods=["lora-8"]).runs(0.002)] == ["lora-8_lr0.002_seed0"]


def test_shared_settings_reach_every_run() -> None:
    runs = Grid(methods=["lora-8", "lora-4"], shared={"num_steps": 3, "dropout": 0.1}).runs(0.1)
    assert {(run.settings.num_steps, run.settings.dropout) for run in runs} == {(3, 0.1)}


@given(st.lists(st.floats(min_value=1e-9, max_value=1e3), min_size=2, unique=True))
def test_different_learning_rates_have_different_names(rates: list[float]) -> None:
    names = {name_run("lora-16", rate, 0) for rate in rates}
    assert len(names) == len(rates)
    assert not any("/" in name for name in names)


def test_names_of_neighbouring_floats_differ() -> None:
    rates = [0.1, 0.1 + 2**-56, 0.30000000000000004, 0.3]
    assert all(name_run("m", a, 0) != name_run("m", b, 0) for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"methods": []}, "methods: expected at least one, got none"),
        ({"methods": "lora-16"}, "methods: expected a list, got 'lora-16'"),
        ({"seeds": []}, "seeds: expected at least one, got none"),
        ({"seeds": [1, 1]}, "seeds: expected each once, got 1 twice"),
        ({"methods": ["lora-8", "lora-4", "lora-8"]}, "methods: expected each once, got lora-8 twice"),
        ({"learning_rates": [0.1, -0.1]}, "learning_rate: expected a number above 0, got -0.1"),
        ({"seeds": [-1]}, "init_seed: expected a whole number from 0 to 4294967295, got -1"),
        ({"shared": {"init_seed": 3}}, "settings that the grid does not vary, got init_seed"),
        ({"shared": {"num_steps": 0}}, "num_steps: expected a whole number of at least 1, got 0"),
        ({"shared": {"steps": 10}}, "settings: expected names among .*, got steps"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Grid(**{"methods": ["lora-16"], **change})
