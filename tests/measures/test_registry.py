from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.measures import registry
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.registry import (
    BUILT_IN,
    all_measures,
    find_measure,
    measure,
    measure_columns,
    spectral_measure,
)
from linchain_analysis.vocabulary import Column, columns_of, define_column, measured_columns


@pytest.fixture
def own_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test marks is forgotten afterwards."""
    all_measures()
    monkeypatch.setattr(registry, "_FOUND", dict(registry._FOUND))


def column(name: str, table: str = "modules") -> Column:
    return Column(table, name, "float", "1", "a test", "")


def test_every_measure_of_the_package_is_found_and_says_what_it_is() -> None:
    found = all_measures()
    assert {
        *("balance", "conditioning", "data_weighted", "gradient_capture", "gradient_spectra", "numerical_rank"),
        *("orders", "preconditioned_step", "preconditioner", "relative_size", "participation_ratio", "nuclear_rank"),
    } <= found.keys()
    for name, each in found.items():
        assert {column.table for column in each.columns} <= {"modules", "factors", "links"}
        assert each.name == name
        assert each.columns
        assert each.summary.endswith(".")
        assert each.level in ("light", "standard", "full", "named", "reading")
        assert (each.level == "reading") == bool(each.source)
    assert not BUILT_IN.keys() & found.keys()


def test_every_column_has_a_name_of_its_own_a_unit_a_meaning_and_a_moment() -> None:
    columns = measure_columns()
    counts = Counter((each.table, each.name) for each in columns)
    assert max(counts.values()) == 1
    fixed = {
        (each.table, each.name) for table in ("steps", "modules", "factors", "links") for each in columns_of(table)
    }
    # The one column of the contract that a measure fills in.
    assert counts.keys() & fixed == {("links", "balance_drift")}
    for each in columns:
        assert each.unit, each.name
        assert each.meaning, each.name
        assert each.moment, each.name
        assert not each.key
    # A name that stands in one table only can be asked for without it.
    assert max(Counter(each.name for each in columns).values()) == 1


def test_columns_by_table() -> None:
    for table in ("steps", "modules", "factors", "links"):
        assert all(each.table == table for each in measure_columns(table))
        assert measured_columns(table) == measure_columns(table)
    tables = Counter(each.table for each in measure_columns())
    assert tables == {table: len(measure_columns(table)) for table in ("steps", "modules", "factors", "links")}
    known = define_column("factors", "own_share")
    assert known is not None
    assert known.meaning.startswith("⟨L_i dF_i R_i")
    assert define_column("modules", "own_share") is None


def test_sampled_measures_say_when() -> None:
    moments = {each.name: each.moment for each in measure_columns()}
    assert moments["order_ratios"] == "after the step"
    assert moments["preconditioner_rank"] == "after the step, at sampled steps"
    assert moments["grad_spectrum"] == "before clipping"


def test_measures_are_found_by_name_and_by_column() -> None:
    assert find_measure("orders").name == "orders"
    assert find_measure("interaction_ratio").name == "orders"
    assert find_measure("balance_drift").name == "balance"
    assert find_measure("participation_ratio").source == "spectrum"


@pytest.mark.parametrize(("wrong", "meant"), [("order", "orders"), ("own_shares", "own_share"), ("balence", "balance")])
def test_a_misspelt_name_is_answered_with_the_likely_one(wrong: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"got '{wrong}'; did you mean '{meant}'\\?$"):
        find_measure(wrong)
    with pytest.raises(InputError, match=r"expected one of balance, .*got 'xyzzy'; choose one of these\.$"):
        find_measure("xyzzy")


@pytest.mark.usefixtures("own_measures")
def test_a_measure_of_the_users_own_appears_everywhere() -> None:
    @measure(column("largest_factor"), level="named", needs=["gradients"], sampled=True)
    def measure_size(cores: Cores) -> dict[str, np.ndarray]:
        """Take the norm of the first factor."""
        return {"largest_factor": np.linalg.norm(cores.before[0], axis=(1, 2))}

    @spectral_measure("σ₁ − σ₂", unit="weight")
    def spectral_gap(sigma: np.ndarray) -> np.ndarray:
        """Return σ₁ − σ₂."""
        return sigma[..., 0] - sigma[..., 1]

    found = find_measure("largest_factor")
    assert found is all_measures()["size"]
    assert (found.level, found.needs, found.sampled) == ("named", {"gradients"}, True)
    assert found.summary == "Take the norm of the first factor."
    assert found.columns[0].moment == "after the step, at sampled steps"
    assert define_column("modules", "largest_factor") == found.columns[0]
    gap = define_column("modules", "spectral_gap")
    assert gap is not None
    assert (gap.unit, gap.derived) == ("weight", True)
    assert spectral_gap(np.array([[3.0, 1.0]])) == 2
    cores = Cores(np.ones(1), (np.ones((1, 2, 2)), np.ones((1, 2, 2))), (np.zeros((1, 2, 2)),) * 2, (2, 2))
    assert measure_size(cores)["largest_factor"] == 2

    # A notebook's cell that is run again defines the same measure again, and may have changed it.
    @measure(column("largest_factor"), column("and_more"))
    def measure_size(cores: Cores) -> dict[str, np.ndarray]:
        """Take two numbers."""
        return {}

    assert [each.name for each in find_measure("size").columns] == ["largest_factor", "and_more"]


@pytest.mark.usefixtures("own_measures")
def test_names_that_are_taken_are_refused() -> None:
    def measure_orders(cores: Cores) -> dict[str, np.ndarray]:
        """Take the place of a measure of the package."""
        return {}

    def measure_mine(cores: Cores) -> dict[str, np.ndarray]:
        """Take the place of a column."""
        return {}

    with pytest.raises(InputError, match="got 'orders'; rename the function"):
        measure(column("new"))(measure_orders)
    with pytest.raises(InputError, match="'imbalance' of links, which balance fills in; rename the column"):
        measure(column("imbalance", "links"))(measure_mine)
    with pytest.raises(InputError, match="'delta_norm' of modules, which the tracker fills in; rename the column"):
        measure(column("delta_norm"))(measure_mine)
    assert "mine" not in all_measures()
    measure(column("imbalance"))(measure_mine)  # the same name in another table is another column
    assert "mine" in all_measures()


@pytest.mark.usefixtures("own_measures")
def test_a_diverged_module_costs_a_measure_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    @measure(column("overflow"))
    def measure_overflow(cores: Cores) -> dict[str, np.ndarray]:
        """Square what is too large for it."""
        return {"overflow": (cores.before[0] ** 2 @ cores.before[1] - np.inf)[:, 0, 0]}

    huge = np.full((1, 1, 1), 1e200)
    values = find_measure("overflow").function(Cores(np.ones(1), (huge, huge), (huge, huge), (1, 1)))
    assert np.isnan(values["overflow"]).all()
    assert not recwarn.list
