from __future__ import annotations

from linchain_analysis.runs.schema import LIVE
from linchain_analysis.vocabulary import COLUMNS, columns_of, define_column

CONTRACT = {
    "steps": "step epoch loss learning_rate grad_norm clip_coef skipped tokens seconds track_seconds",
    "modules": "step module spectrum delta_update_spectrum descent_cosine delta_norm delta_spectral_norm "
    "effective_rank stable_rank delta_update_norm delta_update_effective_rank",
    "factors": "step module factor grad_norm grad_cosine_previous update_norm weight_norm update_ratio",
    "links": "step module link balance_drift",
    "evals": "step split metric value",
}


def test_columns_are_those_that_others_rely_on() -> None:
    for table, names in CONTRACT.items():
        assert [column.name for column in columns_of(table)] == names.split()
    assert {column.table for column in COLUMNS} == set(CONTRACT)


def test_every_column_says_what_it_is() -> None:
    for column in COLUMNS:
        assert column.meaning
        assert column.moment
        assert column.unit or column.kind == "text", column


def test_every_stored_column_is_defined() -> None:
    for table in CONTRACT:
        stored = [column.name for column in columns_of(table) if not column.derived]
        assert set(stored) <= set(LIVE[table].names)


def test_names_of_users_have_no_definition() -> None:
    assert define_column("steps", "loss") is not None
    assert define_column("steps", "my_reward") is None
    assert columns_of("nothing") == ()


def test_units_follow_that_of_the_loss() -> None:
    expected = {
        ("steps", "loss"): ("nats", "1", "K"),
        ("factors", "grad_norm"): ("nats/weight", "1/weight", "K/weight"),
        ("steps", "noise_trace"): ("nats²/weight²", "1/weight²", "K²/weight²"),
        ("modules", "effective_rank"): ("directions",) * 3,
    }
    for key, units in expected.items():
        found = [define_column(*key, unit) for unit in ("nats", "1", "K")]
        assert tuple(column.unit for column in found if column is not None) == units


def test_losses_of_maps_are_defined() -> None:
    for name in ("relative_loss", "excess_loss"):
        column = define_column("steps", name)
        assert column is not None and (column.unit, column.moment, column.basis) == ("1", "after the step", "map")
