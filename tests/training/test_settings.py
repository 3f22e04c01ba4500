from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.errors import InputError
from linchain_analysis.training import FinetuneSettings


@dataclass(frozen=True)
class Defaults:
    learning_rate: float = 0.25
    num_steps: int = 70
    batch_size: int = 9


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("method", "", "method: expected a name, got ''"),
        ("learning_rate", -0.1, "learning_rate: expected a number above 0, got -0.1"),
        ("learning_rate", 0.0, "learning_rate: expected a number above 0, got 0.0"),
        ("learning_rate", float("nan"), "learning_rate: expected a number above 0, got nan"),
        ("learning_rate", "fast", "learning_rate: expected a number above 0, got 'fast'"),
        ("num_steps", 0, "num_steps: expected a whole number of at least 1, got 0"),
        ("num_steps", 2.5, "num_steps: expected a whole number of at least 1, got 2.5"),
        ("num_steps", True, "num_steps: expected a whole number of at least 1, got True"),
        ("batch_size", -3, "batch_size: expected a whole number of at least 1, got -3"),
        ("num_eval", 0, "num_eval: expected a whole number of at least 1, got 0"),
        ("accumulation", 0, "accumulation: expected a whole number of at least 1, got 0"),
        ("num_warmup_steps", -1, "num_warmup_steps: expected a whole number of at least 0, got -1"),
        ("epochs", -1.0, "epochs: expected a number above 0, got -1.0"),
        ("init_seed", -1, "init_seed: expected a whole number from 0 to 4294967295, got -1"),
        ("data_seed", 2**32, "data_seed: expected a whole number from 0 to 4294967295, got 4294967296"),
        ("max_grad_norm", -1.0, "max_grad_norm: expected a number of at least 0, got -1.0"),
        ("dropout", 1.0, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ("schedule", "steep", "schedule: expected one of linear, cosine, constant, got 'steep'"),
        ("preset", "heavy", "preset: expected one of light, standard, full, got 'heavy'"),
        ("preset", "ful", "preset: expected one of light, standard, full, got 'ful'; did you mean 'full'"),
        ("every", 0, "every: expected a whole number of at least 1, got 0"),
        ("every", "now", "every: expected a whole number of at least 1, got 'now'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, value: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        FinetuneSettings(**{"method": "lora-16", name: value})


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"either steps or epochs, got 3 and 2\.0"):
        FinetuneSettings("lora-16", num_steps=3, epochs=2.0)


def test_a_built_in_problem_and_data_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"either a built-in problem or data, got sums and my\.json"):
        FinetuneSettings("lora-16", problem="sums", data="my.json")


def test_resolving_fills_in_only_what_is_open() -> None:
    resolved = FinetuneSettings("lora-16", batch_size=2).resolve(Defaults())
    assert (resolved.learning_rate, resolved.num_steps, resolved.batch_size) == (0.25, 70, 2)
    assert FinetuneSettings("lora-16", learning_rate=1e-3, num_steps=5).resolve(Defaults()).num_steps == 5


def test_epochs_take_the_place_of_the_default_steps() -> None:
    resolved = FinetuneSettings("lora-16", epochs=1.5).resolve(Defaults())
    assert (resolved.num_steps, resolved.epochs) == (None, 1.5)


settings = st.builds(
    FinetuneSettings,
    method=st.text(min_size=1),
    model=st.none() | st.text(min_size=1),
    learning_rate=st.none() | st.floats(min_value=1e-12, max_value=10),
    num_steps=st.none() | st.integers(min_value=1),
    dropout=st.floats(min_value=0, max_value=1, exclude_max=True),
    init_seed=st.integers(min_value=0, max_value=2**32 - 1),
    every=st.just("auto") | st.integers(min_value=1),
    bf16=st.booleans(),
)


@given(settings)
def test_json_holds_settings_without_loss(original: FinetuneSettings) -> None:
    assert FinetuneSettings.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_json_with_a_wrong_name_is_refused() -> None:
    with pytest.raises(InputError, match="got learning_rat; correct the name"):
        FinetuneSettings.from_json({"method": "lora-16", "learning_rat": 0.1})
    with pytest.raises(InputError, match="expected a method, got none"):
        FinetuneSettings.from_json({})


def test_every_setting_is_described() -> None:
    documented = FinetuneSettings.__doc__ or ""
    assert [field.name for field in fields(FinetuneSettings) if f"        {field.name}: " not in documented] == []
