"""Coordinates of shear and rotation, the smallest loss at each point of their plane, and what factors are."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from linchain_analysis.analysis.plane import (
    Order,
    PlaneCoordinates,
    compose,
    count_kinds,
    describe_factors,
    follow,
    locate,
    measure_kinds,
    smallest_losses,
)
from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic.targets import rotation, shear

ORDERS = get_args(Order)
RANDOM = np.random.default_rng(0)


def values(found: PlaneCoordinates) -> list[float]:
    return [float(found.angle), float(found.shear), float(found.first_scale), float(found.second_scale)]


def test_the_targets_stand_where_they_were_made() -> None:
    assert values(locate(shear(0.7) @ rotation(1.1))) == pytest.approx([1.1, 0.7, 1.0, 1.0], abs=1e-14)
    swapped = rotation(1.1) @ shear(0.7)
    assert values(locate(swapped, "rotation-shear")) == pytest.approx([1.1, 0.7, 1.0, 1.0], abs=1e-14)
    # By hand: the rows of diag(1, 2) S(3) are (1, 0) and (6, 2).
    assert values(locate([[1.0, 0.0], [6.0, 2.0]])) == pytest.approx([0.0, 6.0, 1.0, 2.0], abs=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_put_together_again(order: Order) -> None:
    matrices = RANDOM.standard_normal((40, 5, 2, 2))
    np.testing.assert_allclose(compose(locate(matrices, order), order), matrices, atol=1e-13)
    found = locate(matrices, order)
    first, second, turn = shear(0.3), np.diag([2.0, -0.5]), rotation(-2.0)
    product = first @ second @ turn if order == "shear-rotation" else turn @ second[::-1, ::-1] @ first
    assert values(locate(product, order)) == pytest.approx([-2.0, 0.3, 2.0, -0.5], abs=1e-14)
    assert (found.first_scale > 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_scale_changes_neither_angle_nor_shear_and_minus_one_turns_by_half(order: Order) -> None:
    matrix = RANDOM.standard_normal((2, 2))
    here, large, small = (locate(factor * matrix, order) for factor in (1.0, 1e200, 1e-200))
    for other in (large, small):
        assert float(other.angle) == pytest.approx(float(here.angle), abs=1e-14)
        assert float(other.shear) == pytest.approx(float(here.shear), rel=1e-13)
    turned = locate(-matrix, order)
    assert abs(float(turned.angle) - float(here.angle)) == pytest.approx(math.pi, abs=1e-14)
    assert float(turned.shear) == pytest.approx(float(here.shear), rel=1e-13)


def test_reflections_and_singular_matrices_have_a_place() -> None:
    assert values(locate(np.diag([1.0, -1.0]))) == [0.0, 0.0, 1.0, -1.0]
    assert values(locate(np.outer([1.0, 2.0], [0.0, 3.0]))) == pytest.approx([math.pi / 2, 2.0, 3.0, 0.0], abs=1e-15)


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((2, 2)),
        [[0.0, 0.0], [1.0, 2.0]],
        [[1e-17, 0.0], [1.0, 2.0]],
        [[math.nan, 1], [1, 1]],
        [[1, 1], [math.inf, 1]],
    ],
)
def test_no_direction_is_nan(matrix: object) -> None:
    assert np.isnan(values(locate(matrix))).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_the_smallest_loss_is_what_a_search_finds(order: Order) -> None:
    target = shear(1.0) @ rotation(math.pi / 3)
    for angle, amount in [(1.0, 1.0), (0.2, -1.5), (-2.5, 3.0), (2.9, 0.4)]:

        def loss(scales: np.ndarray, angle: float = angle, amount: float = amount) -> float:
            first = scales[0] ** 2  # at least 0
            point = PlaneCoordinates(*(np.asarray(x) for x in (angle, amount, first, scales[1])))
            return float(((compose(point, order) - target) ** 2).sum() / 2)

        starts = [np.array([s, t]) for s in (0.3, 1.5) for t in (-1.0, 1.0)]
        found = min(optimize.minimize(loss, start, method="BFGS", tol=1e-12).fun for start in starts)
        # BFGS stops at gradients near 1e-8, where the loss is exact to about their square; at a = 0 it is quartic.
        assert float(smallest_losses(target, angle, amount, order)) == pytest.approx(found, abs=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_the_smallest_loss_is_below_that_of_every_matrix_and_zero_at_the_target(order: Order) -> None:
    target = RANDOM.standard_normal((2, 2))
    matrices = RANDOM.standard_normal((200, 2, 2))
    found = locate(matrices, order)
    own = ((matrices - target) ** 2).sum(axis=(-2, -1)) / 2
    assert (smallest_losses(target, found.angle, found.shear, order) <= own + 1e-12).all()
    truth = locate(target, order)
    assert float(smallest_losses(target, truth.angle, truth.shear, order)) == pytest.approx(0.0, abs=1e-28)


def test_paths_begin_after_the_first_step_and_turn_on_beyond_half_a_turn() -> None:
    angles = np.radians([170.0, 190.0, 210.0])
    deltas = np.stack([np.zeros((2, 2)), *(rotation(angle) for angle in angles)])[None]
    labels = pd.DataFrame({"run": ["a"], "method": ["lora-2"]})
    path = follow(deltas, labels, rotation(angles[2]))
    assert path["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(path["angle"], [170, 190, 210], rtol=1e-13)
    # ‖R(α) − R(β)‖² = 4 (1 − cos(α − β)), and ‖R‖² = 2.
    np.testing.assert_allclose(path["relative_loss"], 2 * (1 - np.cos(np.radians([40.0, 20.0, 0.0]))), atol=1e-14)
    assert path["method"].tolist() == ["lora-2"] * 3


def test_shares_of_rotation_and_shear_by_hand() -> None:
    turned, sheared = measure_kinds(np.stack([3 * rotation(0.4), -2 * shear(5.0), np.eye(2), np.diag([1.0, -1.0])]))
    # S(5) = I + 5 E: (1 + 25/4) · 2 of 27 in the plane of rotations.
    np.testing.assert_allclose(turned, [1, 14.5 / 27, 1, 0], atol=1e-15)
    np.testing.assert_allclose(sheared, [np.cos(0.4) ** 2 + np.sin(0.4) ** 2 / 2, 1, 1, 0], atol=1e-15)
    assert np.isnan(measure_kinds(np.zeros((2, 2)))).all()


def test_shares_of_normal_matrices_are_uniform() -> None:
    for share in measure_kinds(np.random.default_rng(1).standard_normal((4000, 2, 2))):
        # The standard error of a quantile q of a uniform variable is √(q (1 − q) / 4000) < 0.008.
        np.testing.assert_allclose(
            np.quantile(share, [0.05, 0.25, 0.5, 0.75, 0.95]), [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.03
        )


def test_kinds_are_counted_and_told_from_chance() -> None:
    labels = pd.DataFrame({"run": ["a", "b", "c", "d"]})
    turned, sheared = rotation(0.9), shear(4.0)
    neither = np.diag([1.0, -1.0])
    factors = {
        "W1": np.stack([turned, neither, turned, np.eye(2)]),
        "W2": np.stack([sheared, sheared, neither, neither]),
    }
    counted = count_kinds(describe_factors(factors, labels)).set_index("factor")
    assert counted.loc["W1", ["rotations", "shears"]].tolist() == [0.75, 0.25]
    assert counted.loc["W2", ["rotations", "shears"]].tolist() == [0.0, 0.5]
    assert counted.loc["apart", "rotations"] == 0.25  # a alone; d has one factor that is both, and no second
    # W2 of other runs: beside the rotations a, c, d stand shears in (b), (a, b), (a, b) of three others each.
    assert counted.loc["apart by chance", "rotations"] == pytest.approx((1 + 2 + 2) / 12)


def describe(kinds: dict[str, str]) -> pd.DataFrame:
    """Factors by name with one letter per run: Rotation, Shear, Both, neither (.), or no such factor (space)."""
    shares = {"R": (1.0, 0.0), "S": (0.0, 1.0), "B": (1.0, 1.0), ".": (0.0, 0.0)}
    return pd.DataFrame(
        [
            {"run": run, "factor": name, "rotation_share": shares[kind][0], "shear_share": shares[kind][1]}
            for name, own in kinds.items()
            for run, kind in enumerate(own)
            if kind != " "
        ]
    )


def shares_apart(described: pd.DataFrame) -> tuple[float, float]:
    found = count_kinds(described).set_index("factor")["rotations"]
    return float(found["apart"]), float(found["apart by chance"])


def test_chance_takes_factors_from_other_runs_only() -> None:
    """Ten of twenty runs have both kinds: (Σt Σs − Σts) / (n (n − 1)), wherever a third factor stands between."""
    half = ".R" * 10, "." * 20, ".S" * 10
    for names in itertools.permutations(("A", "B", "W1")):
        apart, chance = shares_apart(describe(dict(zip(names, half, strict=True))))
        assert apart == 0.5
        assert chance == pytest.approx((10 * 10 - 10) / (20 * 19), abs=1e-15)
    assert shares_apart(describe({"A": "R.", "B": "..", "W1": "S."})) == (0.5, 0.0)


@pytest.mark.parametrize("num_factors", [1, 2, 3, 4])
def test_chance_is_the_mean_over_all_choices_of_different_runs(num_factors: int) -> None:
    random = np.random.default_rng(num_factors)
    for num_runs in range(max(2, num_factors), 7):
        table = random.choice(list("RSB.."), (num_factors, num_runs))
        found = [
            any(table[i, a] in "RB" and table[j, b] in "SB" for (i, a), (j, b) in itertools.permutations(taken, 2))
            for runs in itertools.permutations(range(num_runs), num_factors)
            for taken in [list(enumerate(runs))]
        ]
        _, chance = shares_apart(describe({f"W{i}": "".join(row) for i, row in enumerate(table)}))
        assert chance == pytest.approx(np.mean(found), abs=1e-12)


def test_a_missing_factor_is_of_no_kind() -> None:
    assert shares_apart(describe({"A": "RRRR", "W1": "  ..", "B": "RRRR"})) == (0.0, 0.0)
    assert shares_apart(describe({"A": "RRRR", "W1": "  SS", "B": "...."})) == (0.5, 0.5)


def test_too_few_runs_for_a_chance() -> None:
    assert shares_apart(describe({"A": "R", "B": "S"})) == (1.0, pytest.approx(math.nan, nan_ok=True))
    # Three factors of some kind cannot come from three of two runs.
    assert math.isnan(shares_apart(describe({"A": "R.", "B": ".S", "W1": "RS"}))[1])


@pytest.mark.filterwarnings("error")
def test_no_runs_are_empty_tables() -> None:
    labels = pd.DataFrame({"run": ["a"], "method": ["lora-2"]})
    one = follow(rotation(1.0)[None, None], labels, np.eye(2))
    none = follow(np.zeros((0, 4, 2, 2)), labels.iloc[:0], np.eye(2))
    assert (list(none), len(none)) == (list(one), 0)
    factors = describe_factors({"W1": rotation(1.0)[None]}, labels)
    for empty in (describe_factors({}, labels), describe_factors({"W1": np.zeros((0, 2, 2))}, labels.iloc[:0])):
        assert (list(empty), len(empty)) == (list(factors), 0)
        assert count_kinds(empty)["factor"].tolist() == ["apart", "apart by chance"]
        assert count_kinds(empty)["rotations"].isna().all()


@pytest.mark.filterwarnings("error")
def test_nothing_is_relative_to_a_target_of_zero() -> None:
    path = follow(rotation(np.radians(30.0))[None, None], pd.DataFrame({"run": ["a"]}), np.zeros((2, 2)))
    assert path["angle"].tolist() == [pytest.approx(30.0, rel=1e-14)]
    assert path["relative_loss"].isna().all()


@pytest.mark.parametrize("matrix", [-np.eye(2), [[-1.0, -1e-300], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])
def test_half_a_turn_is_plus_pi(matrix: object) -> None:
    assert float(locate(matrix).angle) == math.pi  # type: ignore[arg-type]


def test_the_smallest_loss_at_any_shear() -> None:
    target = shear(1.0) @ rotation(0.3)
    with warnings.catch_warnings(action="error"):
        found = smallest_losses(target, 0.3, [1e10, 1e160, -1e300, math.inf])
    # T R(−θ) = S(1): of its first column (1, 1) only what is along (1, k) → (0, 1) is left to a; 1/2 remains. To 1 / k.
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5 + 0.5, math.nan], rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", ["locate", "smallest_losses"])
def test_other_sizes_and_orders_are_refused(place: str) -> None:
    with pytest.raises(InputError, match="matrices of 2 × 2"):
        locate(np.eye(3)) if place == "locate" else smallest_losses(np.eye(3), 0, 0)
    with pytest.raises(InputError, match="order: expected one of shear-rotation, rotation-shear"):
        locate(np.eye(2), "sideways")  # type: ignore[arg-type]
