from __future__ import annotations

import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.tracking.schedule import Budget, parse_every


def simulate(schedule: Budget, num_steps: int, bytes_per_record: int) -> list[int]:
    written, recorded = 0, []
    for step in range(1, num_steps + 1):
        if schedule.wants(step, written):
            recorded.append(step)
            written += bytes_per_record
    return recorded


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("num_steps", [50, 1_000, 32_000])
def test_a_budget_is_kept_and_spread_over_the_whole_run(known: bool, num_steps: int) -> None:
    bytes_per_record = 72_000  # 160 modules of 450 bytes
    budget = 200_000_000
    recorded = simulate(Budget(budget, num_steps if known else None), num_steps, bytes_per_record)
    assert recorded[: min(100, num_steps)] == list(range(1, min(100, num_steps) + 1))
    assert len(recorded) * bytes_per_record <= budget + bytes_per_record
    if num_steps * bytes_per_record <= budget / 2:
        assert len(recorded) == num_steps
    else:
        assert len(recorded) * bytes_per_record > budget / 3
    assert num_steps - recorded[-1] <= num_steps / 20  # the end is there, too


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("num_steps", [3_000, 32_000])
def test_rows_of_steps_that_are_not_recorded_count_too(known: bool, num_steps: int) -> None:
    """As a run is: a manifest, a row of `steps` for every step, and some bytes at the end."""
    budget, written = 200_000_000, 80_000
    schedule = Budget(budget, num_steps if known else None)
    for step in range(1, num_steps + 1):
        written += 500 + 72_000 * schedule.wants(step, written)
    assert written + 10_000 <= budget
    assert written > 0.5 * budget


@pytest.mark.parametrize("known", [True, False])
def test_a_small_budget_is_kept_from_the_first_step(known: bool) -> None:
    recorded = simulate(Budget(200_000, 1_000 if known else None), 1_000, 72_000)
    assert recorded == [1, 2]


def test_numbers_functions_and_words() -> None:
    assert [s for s in range(1, 10) if parse_every(3).wants(s, 0)] == [3, 6, 9]
    assert [s for s in range(1, 10) if parse_every("4").wants(s, 0)] == [4, 8]
    assert [s for s in range(1, 10) if parse_every(lambda s: s > 7).wants(s, 0)] == [8, 9]
    assert isinstance(parse_every("auto"), Budget)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "often", None])
def test_anything_else_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="every: expected"):
        parse_every(wrong)  # type: ignore[arg-type]
