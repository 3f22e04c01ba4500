"""The controls on synthetic problems: what they compute, and that each of them can fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from linchain_analysis.controls import acceleration, balance, completion, edge, few_examples, registry
from linchain_analysis.controls.intervals import mean_interval, ratio_interval
from linchain_analysis.controls.small_networks import adapt_network, draw_network, flatten
from linchain_analysis.measures.sharpness import stability_edge

Change = Callable[[pd.DataFrame], pd.DataFrame]


def test_intervals_by_hand() -> None:
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.302653 (tables give six decimals), √3.
    half = 4.302653 / 3**0.5
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-6)
    assert ratio_interval([2.0, 2.0, 2.0]) == pytest.approx((2, 2, 2), rel=1e-12)
    assert ratio_interval([1.0, 4.0])[0] == pytest.approx(2, rel=1e-12)
    assert np.isnan(mean_interval([1.0, np.nan])).all()
    assert np.isnan(mean_interval([])).all()
    assert np.isnan(ratio_interval([1.0, 0.0])).all()
    assert np.isnan(mean_interval([1.0])[1:]).all()


# balance


def balance_table() -> pd.DataFrame:
    rows = [
        {"learning_rate": rate, "seed": seed, "link": link, "balance_drift": rate * (1 + link), "loss_left": 0.1}
        for rate in (1e-4, 1e-3, 1e-2, 0.0)
        for seed in (0, 1)
        for link in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_balance_drift_of_factors_by_hand() -> None:
    # 1 × 1 factors from (1, 2) to (3, 2): a² − b² moves from −3 to 5, and 8 of 9 + 4 is the drift.
    start, end = [np.ones((1, 1, 1)), np.full((1, 1, 1), 2.0)], [np.full((1, 1, 1), 3.0), np.full((1, 1, 1), 2.0)]
    np.testing.assert_allclose(balance.measure_drift(start, end), [[8 / 13]], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda t: t, True),
        (lambda t: t.assign(balance_drift=t["balance_drift"] ** 0.8), False),
        (lambda t: t.assign(balance_drift=np.where(t["learning_rate"] > 0, 1e-3, 0)), False),
        (lambda t: t.assign(balance_drift=t["balance_drift"] + 1e-6), False),  # the flow drifts, too
        (lambda t: t[t["learning_rate"] != 1e-4], False),  # one decade only
        (lambda t: t.assign(balance_drift=t["balance_drift"].where(t.index > 0)), False),  # NaN
    ],
)
def test_balance_is_judged(change: Change, passes: bool) -> None:
    finding = balance.judge(change(balance_table()))
    assert finding.passed is passes
    assert "slope" in finding.statement


def test_balance_for_real() -> None:
    found = balance.judge(balance.measure(seeds=(0, 1)))
    assert found.passed, found.statement
    assert found.drawn.figure.axes
    # The figure shows what was judged.
    pd.testing.assert_frame_equal(found.drawn.table, found.table)


# edge


def edge_table() -> pd.DataFrame:
    rows = []
    for optimizer in ("gradient_descent", "adam"):
        for rate in (0.1, 0.2, 0.4):
            value = stability_edge(optimizer, rate)
            for share in (0.25, 0.5, 0.8, 0.9, 1.0):
                sharpness = value * (0.95 if share > 0.75 else 0.3)
                row = {"subject": "network", "optimizer": optimizer, "learning_rate": rate, "edge": value}
                rows.append({**row, "step": 100 * share, "share": share, "loss": 0.1, "sharpness": sharpness})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda t: t, True),
        # 0.95 · 0.9 is within 20 % and not within 10 %.
        (lambda t: t.assign(sharpness=t["sharpness"].where(t["optimizer"] != "adam", 0.9 * t["sharpness"])), True),
        (lambda t: t.assign(sharpness=0.9 * t["sharpness"]), False),
        (lambda t: t.assign(sharpness=t["sharpness"].where(t["learning_rate"] != 0.2, 2.0)), False),
        (lambda t: t[t["learning_rate"] != 0.2], False),
        (lambda t: t[t["optimizer"] == "adam"], False),
        (lambda t: t.assign(sharpness=t["sharpness"].where(t["share"] != 0.9)), False),  # NaN
        (lambda t: t.assign(subject="lora-4"), False),
    ],
)
def test_edge_is_judged(change: Change, passes: bool) -> None:
    assert edge.judge(change(edge_table())).passed is passes


def test_edge_says_what_is_judged() -> None:
    table = edge_table()
    assert "not judged" not in edge.judge(table).statement
    lora = table[table["optimizer"] == "adam"].assign(subject="lora-4", sharpness=0.0)
    found = edge.judge(pd.concat([table, lora]))
    assert found.passed
    assert found.statement.startswith("Judged is a network trained in full, without an adapter.")
    assert "not judged: lora-4 under Adam at 0.000 (rate 0.1), lora-4 under Adam at 0.000 (rate 0.2)" in found.statement


@pytest.mark.parametrize("optimizer", ["gradient_descent", "adam"])
def test_sharpness_along_a_training_against_torch_and_a_dense_hessian(optimizer: str) -> None:
    rate, num_steps = 0.01, 12
    table = edge.measure([edge.Training("network", optimizer, rate, num_steps)])
    loss, start = flatten(draw_network(0))
    vector = torch.nn.Parameter(start)
    kind = torch.optim.SGD if optimizer == "gradient_descent" else torch.optim.Adam
    steps = kind([vector], lr=rate)
    for _ in range(num_steps):
        steps.zero_grad()
        loss(vector).backward()
        steps.step()
    hessian = torch.func.hessian(loss)(vector.detach())
    if optimizer == "adam":
        root = (steps.state[vector]["exp_avg_sq"] / (1 - 0.999**num_steps)).sqrt() + 1e-8
        diagonal = ((1 - 0.9**num_steps) * root).sqrt()
        hessian = hessian / diagonal[:, None] / diagonal
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    last = table.iloc[-1]
    assert last["step"] == num_steps
    assert last["loss"] == pytest.approx(float(loss(vector.detach())), rel=1e-10)  # the two Adams round differently
    assert last["sharpness"] == pytest.approx(expected, rel=1e-4)  # ARPACK's tolerance


def test_an_adapted_network_trains_its_adapter_alone_and_starts_as_it_was() -> None:
    network = draw_network(0, 2, 20, bias=1.0)
    before, _ = flatten(network)
    value = float(before(flatten(network)[1]))
    loss, start = flatten(adapt_network(network, "lora-4", 0))
    assert start.shape == (2 * 4 * 20,)
    assert start.dtype == torch.float64
    assert float(loss(start)) == pytest.approx(value, rel=1e-12)


# acceleration


def acceleration_table() -> pd.DataFrame:
    rows = []
    speeds = {"quadratic": (20, 25, 40), "quartic": (60, 20, 18)}
    for loss, counts in speeds.items():
        for depth, count in zip((1, 2, 3), counts, strict=True):
            for seed in (0, 1, 2):
                steps = np.arange(count + seed + 1)
                curve = np.geomspace(1, 5e-4, len(steps))
                rows.append(
                    pd.DataFrame({"loss": loss, "depth": depth, "seed": seed, "step": steps, "relative_loss": curve})
                )
    return pd.concat(rows, ignore_index=True).assign(learning_rate=0.1, rate_inside=True)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda t: t, True),
        (lambda t: t.assign(loss=t["loss"].map({"quadratic": "quartic", "quartic": "quadratic"})), False),
        (lambda t: t.assign(depth=t["depth"].map({1: 2, 2: 1, 3: 3})), False),
        (lambda t: t.assign(rate_inside=t["depth"] < 3), False),
        (lambda t: t[t["depth"] < 3], False),
        (lambda t: t.assign(relative_loss=t["relative_loss"].clip(lower=0.01)), False),  # never there
        (lambda t: t.assign(relative_loss=t["relative_loss"].where(t["step"] < 15)), False),  # diverged
    ],
)
def test_acceleration_is_judged(change: Change, passes: bool) -> None:
    assert acceleration.judge(change(acceleration_table())).passed is passes


def test_steps_count_from_where_a_curve_stays_below() -> None:
    low, high = 1e-4, 1e-2
    curves = np.array([[1, low, low], [1, low, high], [low, low, low], [low, high, low], [1, np.nan, np.nan]])
    np.testing.assert_array_equal(acceleration.count_steps(curves), [1, np.inf, 0, 2, np.inf])


def test_depth_one_is_gradient_descent_on_the_weights() -> None:
    curves = acceleration._train("quartic", 1, [3], [0.5], 30)[0, 0]
    setting = acceleration.MapSetting(
        "spectrum", dim=16, dim_out=1, target_rank=1, num_samples=200, input_decay=1.0, loss="quartic"
    )
    problem = setting.draw([3])
    assert problem.design is not None
    inputs, w = problem.design[0], acceleration.start_factors(1, 3)[0]
    scale = np.mean((inputs @ problem.targets[0]) ** 4) / 4
    for value in curves:
        residual = inputs @ (w - problem.targets[0])
        assert value == pytest.approx(np.mean(residual**4) / 4 / scale, rel=1e-10)  # 30 steps of rounding
        w = w - 0.5 * inputs.T @ residual**3 / len(inputs)


@pytest.mark.parametrize("depth", [2, 3])
def test_every_depth_starts_at_the_same_weights_in_balance(depth: int) -> None:
    factors = acceleration.start_factors(depth, 5)
    first, *rest = factors
    product = first
    for factor in rest:
        product = product @ factor
        np.testing.assert_allclose(np.linalg.norm(factor), np.linalg.norm(first), rtol=1e-12)
    np.testing.assert_allclose(product, acceleration.start_factors(1, 5)[0], rtol=1e-12)


# completion


def completion_table() -> pd.DataFrame:
    rows = [
        {"depth": depth, "seed": seed, "error": 0.3 / depth**3 + seed / 1e4, "effective_rank": 7.0 - depth}
        for depth in (2, 3, 4)
        for seed in range(5)
    ]
    table = pd.DataFrame(rows).assign(train_error=1e-3)
    return table.assign(effective_rank=table["effective_rank"] + table["seed"] / 100 * table["depth"])


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda t: t, True),
        (lambda t: t.assign(depth=6 - t["depth"]), False),
        (lambda t: t.assign(error=0.1 + t["seed"] / 100), False),
        (lambda t: t.assign(effective_rank=t["effective_rank"].where(t["depth"] < 4, 6.0)), False),
        (lambda t: t.assign(train_error=t["train_error"].where(t.index > 0, 0.5)), False),
        (lambda t: t.assign(error=t["error"].where(t.index != 7)), False),  # NaN
        (lambda t: t[t["depth"] < 4], False),
    ],
)
def test_completion_is_judged(change: Change, passes: bool) -> None:
    assert completion.judge(change(completion_table())).passed is passes


def test_completion_measures_errors_over_all_and_over_seen_entries() -> None:
    table = completion.measure(depths=(2,), seeds=(0, 1), num_steps=0)
    # ΔW at the start is 1e-3 of the target, entry by entry.
    np.testing.assert_allclose(table[["error", "train_error"]], 1, atol=5e-3)
    products = [np.linalg.norm(np.linalg.multi_dot(completion.start_factors(depth, 0))) for depth in (2, 3, 4)]
    # 1e-3 √40 in expectation; of 1600 entries the norm is within some per cent of that.
    np.testing.assert_allclose(products, 1e-3 * 40**0.5, rtol=0.2)


# few examples


def few_table() -> pd.DataFrame:
    rows = [
        {
            "num_samples": count,
            "method": method,
            "seed": seed,
            "error": (2 if method == "LoRA" else 1) * 10 / count + seed / 1e3 * (1 + (method == "LoRA")),
            "effective_rank": (5 if method == "LoRA" else 2) + seed / 100 * (1 + (method == "LoRA")),
        }
        for count in few_examples.NUM_SAMPLES
        for method in ("LoRA", "Deep LoRA")
        for seed in range(4)
    ]
    return pd.DataFrame(rows).assign(learning_rate=1e-3, rate_inside=True)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda t: t, True),
        (lambda t: t.assign(method=t["method"].map({"LoRA": "Deep LoRA", "Deep LoRA": "LoRA"})), False),
        (lambda t: t.assign(error=t["error"].where(t["num_samples"] != 16, 0.5 + t["seed"])), False),
        (lambda t: t.assign(error=t["error"] * t["num_samples"]), False),  # it does not shrink
        (lambda t: t.assign(effective_rank=3.0), False),
        (lambda t: t.assign(rate_inside=t["num_samples"] != 32), False),
        (lambda t: t.assign(error=t["error"].where(t.index > 0, np.inf)), False),
        (lambda t: t[t["num_samples"] < 256], False),
        (lambda t: t[t["num_samples"] != 32], False),
    ],
)
def test_few_examples_are_judged(change: Change, passes: bool) -> None:
    assert few_examples.judge(change(few_table())).passed is passes


def test_few_examples_measure_every_method_at_their_best_rates() -> None:
    table = few_examples.measure((16,), rates=(1e-6, 1e-3, 1e3), selection_seeds=(5,), seeds=(0, 1), num_steps=150)
    assert table.groupby("method").size().to_dict() == {"Deep LoRA": 2, "LoRA": 2, "LoRA, small start": 2}
    assert (table["learning_rate"] == 1e-3).all()
    assert table["rate_inside"].all()
    assert table["error"].between(0, 1.2).all()
    first, middle, last = few_examples.start_deep_lora(0)
    for orthogonal in (first.T @ first, middle @ middle.T, last @ last.T):
        np.testing.assert_allclose(orthogonal, 1e-6 * np.eye(8), atol=1e-18)  # eps · ε², and some


@pytest.mark.slow
@pytest.mark.parametrize("name", ["acceleration", "completion", "edge", "few-examples"])
def test_controls_for_real(name: str) -> None:
    found = registry.all_controls()[name].run()
    assert found.passed, found.statement
