import numpy as np
import pandas as pd
import pytest

from linchain_analysis.analysis.comparisons import require_one_condition, split_comparisons
from linchain_analysis.analysis.methods import family_of, sort_methods
from linchain_analysis.errors import InputError


def _catalogue(*runs: tuple[str, str | None, float]) -> pd.DataFrame:
    columns = ["method", "problem", "base_learning_rate"]
    return pd.DataFrame(runs, columns=columns).assign(run=[f"r{k}" for k in range(len(runs))])


def test_runs_at_one_rate_each_stay_together() -> None:
    (found,) = split_comparisons(_catalogue(("lora-16", "sums", 1e-3), ("moslora-16", "sums", 2e-3)))
    assert (found.name, found.runs) == ("sums", ("r0", "r1"))


def test_problems_and_rates_are_split() -> None:
    found = split_comparisons(
        _catalogue(("lora-16", "a b/c", 1e-3), ("lora-16", "sums", 1e-3), ("lora-16", "sums", 2e-3))
    )
    assert [(one.name, one.runs) for one in found] == [
        ("a-b-c", ("r0",)),
        ("sums-lr0.001", ("r1",)),
        ("sums-lr0.002", ("r2",)),
    ]


def test_an_unnamed_problem_is_a_comparison_too() -> None:
    (found,) = split_comparisons(_catalogue(("lora-16", None, np.nan), ("moslora-16", None, np.nan)))
    assert (found.name, len(found.runs)) == ("unnamed", 2)


def test_two_rates_of_one_method_are_refused_with_their_rates() -> None:
    require_one_condition(_catalogue(("lora-16", "sums", 1e-3), ("moslora-16", "sums", 2e-3)))
    with pytest.raises(InputError, match=r"lora-16 at one .* got sums at 0\.001, sums at 0\.002"):
        require_one_condition(_catalogue(("lora-16", "sums", 1e-3), ("lora-16", "sums", 2e-3)))


def test_methods_stand_by_family_then_by_number() -> None:
    mixed = [
        "own",
        "full-finetune",
        "linchain-10-8",
        "linchain-2-8",
        "linchain-3-16",
        "moslora-16",
        "lora-16",
        "lora-8",
    ]
    assert sort_methods([*mixed, "lora-8"]) == [
        "lora-8",
        "lora-16",
        "moslora-16",
        "linchain-2-8",
        "linchain-3-16",
        "linchain-10-8",
        "full-finetune",
        "own",
    ]


@pytest.mark.parametrize(
    ("method", "family"), [("linchain-3-16-orthogonal", "linchain"), ("lora", "lora"), ("loraplus-8", "loraplus-8")]
)
def test_family(method: str, family: str) -> None:
    assert family_of(method) == family
