"""The controls rslora, lora-plus, intruders and weight-decay: what they predict, and that each can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from linchain_analysis.controls import intruders, lora_plus, rslora, weight_decay, wide_layers
from linchain_analysis.controls.built_in_model import adapt_model, draw_batches, prepare_sums, trained_parameters
from linchain_analysis.measures.theory.initial_factors import draw_first_factor
from linchain_analysis.training.synthetic.batch import train_chains
from linchain_analysis.training.synthetic.optimizers import OptimizerSettings

# rslora


@pytest.mark.parametrize(
    ("quantity", "optimizer", "d_in", "lora", "rslora_"),
    [
        ("grad_norm", "sgd", 160, -0.5, 0.0),
        ("grad_norm", "adam", 160, -0.5, 0.0),
        ("first_order_gain", "sgd", 160, -1.0, 0.0),
        ("first_order_gain", "adam", 160, 0.0, 0.5),
        # r far below d_in: ‖dΔW‖ ∝ γ² √r and γ √r; far above it: γ² r and γ r.
        ("delta_update_norm", "sgd", 1e12, -1.5, -0.5),
        ("delta_update_norm", "adam", 1e12, -0.5, 0.0),
        ("delta_update_norm", "sgd", 1e-9, -1.0, 0.0),
        ("delta_update_norm", "adam", 1e-9, 0.0, 0.5),
    ],
)
def test_exponents_of_the_rank_in_their_limits(
    quantity: str, optimizer: str, d_in: float, lora: float, rslora_: float
) -> None:
    ranks = [2**k for k in range(10, 16)]  # so that −1/5 beside r, in the last but one case, is below the tolerance
    for scaling, expected in (("lora", lora), ("rslora", rslora_)):
        found = rslora.predict_exponent(quantity, optimizer, scaling, ranks, d_in)
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_exponent_of_the_update_norm_against_drawn_first_factors(optimizer: str) -> None:
    rng = np.random.default_rng(0)
    ranks, d_in, num_draws = (4, 16, 64), 40, 400
    gradient = rng.standard_normal((d_in, 3))
    norms = []
    for rank in ranks:
        first = np.stack([draw_first_factor(d_in, rank, rng) for _ in range(num_draws)])
        step = np.swapaxes(first, 1, 2) @ gradient
        change = first @ (step if optimizer == "sgd" else np.sign(step))
        # γ = 1/√r, which Adam's step holds once and SGD's twice.
        scale = rank**-0.5 if optimizer == "adam" else 1 / rank
        norms.append(scale * np.sqrt((change**2).sum(axis=(1, 2)).mean()))
    found = rslora.fit_exponent(np.array(ranks, dtype=float), np.array(norms))
    expected = rslora.predict_exponent("delta_update_norm", optimizer, "rslora", ranks, d_in)
    # Relative spread of one draw's square is about √(2/r) at most, over 20 in the mean, over ln 16 in the slope.
    assert found == pytest.approx(expected, abs=0.03)


def ranked(change: Callable[[str, str, str], float] = lambda *key: 0.0) -> pd.DataFrame:
    """A table as `measure` makes it, of exact powers of r; `change` is added to an exponent."""
    rows = []
    for optimizer in ("sgd", "adam"):
        for scaling in rslora.SCALINGS:
            gain = -1.0 if scaling == "lora" else 0.0
            quantities = ["grad_norm", "first_order_gain", "delta_update_norm"]
            for quantity in [*quantities, "gain"] if optimizer == "sgd" else quantities:
                for seed in (0, 1):
                    known = quantity == "gain"
                    power = (
                        gain if known else rslora.predict_exponent(quantity, optimizer, scaling, rslora.RANKS, 160.0)
                    )
                    power += change(optimizer, scaling, quantity)
                    for rank in rslora.RANKS:
                        rows.append(
                            {
                                "optimizer": optimizer,
                                "scaling": scaling,
                                "seed": seed,
                                "rank": rank,
                                "module": "" if known else "q_proj",
                                "d_in": 160.0,
                                "quantity": quantity,
                                "value": (1 + seed) * float(rank) ** power,
                            }
                        )
    return pd.DataFrame(rows)


def test_rslora_passes_on_exact_powers_and_draws_them() -> None:
    found = rslora.judge(ranked())
    assert found.passed
    assert found.measured["gain sgd lora"] == pytest.approx(-1, abs=1e-12)
    # Each panel has its own rows, of either scale, seed and rank; the gradient norm is drawn of SGD alone.
    assert len(found.table) == (4 + 3) * 2 * 2 * len(rslora.RANKS)
    last = found.table.query("optimizer == 'sgd' and scaling == 'lora' and quantity == 'gain' and rank == 128")
    np.testing.assert_allclose(last["relative"], 4 / 128, rtol=1e-12)


def test_rslora_says_what_adam_does() -> None:
    told = "as the rank grows is stable with α/r (r^0.00) and grows with α/√r (r^0.50)."
    assert rslora.judge(ranked()).statement.endswith(told)
    assert "under sgd" in rslora.CONTROL.claim.lower()
    # α/r to r^-0.2, α/√r to r^0.4: said of whatever was measured.
    other = rslora.judge(ranked(lambda *at: {"lora": -0.2, "rslora": -0.1}[at[1]] * (at[2] == "first_order_gain")))
    assert other.statement.endswith("as the rank grows falls with α/r (r^−0.20) and grows with α/√r (r^0.40).")
    sgd = ranked().query("optimizer == 'sgd'")
    assert "is unknown with α/r" in rslora.judge(sgd).statement


@pytest.mark.parametrize(
    "wrong",
    [
        ("sgd", "rslora", "gain", -0.2),  # learning falls with the rank after all
        ("sgd", "lora", "gain", 0.9),  # nor does it collapse with α/r
        ("sgd", "rslora", "grad_norm", -0.2),
        ("adam", "lora", "first_order_gain", -1.0),
        ("adam", "rslora", "delta_update_norm", 0.2),
        ("sgd", "lora", "first_order_gain", float("nan")),
        ("sgd", "lora", "gain", float("nan")),
    ],
)
def test_rslora_fails_on_any_other_exponent(wrong: tuple[str, str, str, float]) -> None:
    *key, change = wrong
    assert not rslora.judge(ranked(lambda *at: change if list(at) == key else 0.0)).passed


def test_rslora_fails_without_all_of_the_exponents() -> None:
    table = ranked()
    assert not rslora.judge(table[table["optimizer"] == "sgd"]).passed
    assert not rslora.judge(table[table["quantity"] != "gain"]).passed


def test_the_first_step_is_read_from_the_tracker() -> None:
    table = rslora.measure(ranks=(4,), seeds=(0,), num_steps=1)
    values = table.pivot_table(index="module", columns=["optimizer", "scaling", "quantity"], values="value")
    # Both scales are 2 at rank 4, so that they are one run.
    for optimizer in ("sgd", "adam"):
        pd.testing.assert_frame_equal(values[optimizer]["lora"], values[optimizer]["rslora"])
    sgd = values["sgd"]["lora"].drop(index="")
    # ⟨g, η g⟩ = η ‖g‖², in float32.
    np.testing.assert_allclose(sgd["first_order_gain"], 1e-3 * sgd["grad_norm"] ** 2, rtol=1e-5)
    # What the loss gains in a step as small as this is its first order, but for curvature: ‖dΔW‖ is 0.2 % of ‖W₀‖.
    gained = table.loc[table["quantity"] == "gain", "value"].iloc[0]
    assert gained == pytest.approx(sgd["first_order_gain"].sum(), rel=0.1)


# lora-plus


Exponents = dict[str, tuple[float, float, float]]

RIGHT: Exponents = {"ratio": (0.0, 0.0, 0.0), "equal-slow": (0.0, -1.0, 0.3), "equal-fast": (0.5, 0.0, 0.0)}


def powers(of_rate: dict[float, Exponents] | None = None) -> pd.DataFrame:
    """A table as `measure` makes it, of exact powers of d for features, output and loss; `RIGHT` but at these rates."""
    rows = [
        {
            "rate": rate,
            "rule": rule,
            "dim": dim,
            "seed": seed,
            "features": (dim / 64) ** features,
            "output": (dim / 64) ** output,
            "loss": (0.1 + 0.01 * seed) * (dim / 64) ** loss,
            "share_A": 0.4,
            "share_B": 0.4,
        }
        for rate in wide_layers.RATES
        for rule, (features, output, loss) in (of_rate or {}).get(rate, RIGHT).items()
        for dim in wide_layers.DIMS
        for seed in range(4)
    ]
    return pd.DataFrame(rows)


def valley(*edges: int) -> pd.DataFrame:
    """Tuned losses, 0.1 up to a ratio of each dim's edge and 0.4 beyond."""
    return pd.DataFrame(
        {
            "dim": dim,
            "ratio": ratio,
            "seed": seed,
            "rate_mean": 1.0,
            "tuning_loss": 0.1 if ratio <= edge else 0.4,
            "loss": (1 + 0.1 * seed) * (0.1 if ratio <= edge else 0.4),
        }
        for dim, edge in zip(wide_layers.TUNED_DIMS, edges, strict=True)
        for ratio in wide_layers.RATIOS
        for seed in range(4)
    )


def test_lora_plus_passes_on_the_exponents_of_the_theory() -> None:
    found = lora_plus.judge(powers(), valley(16, 64, 256))
    assert found.passed
    assert found.measured["features equal-fast, rate 0.1"] == pytest.approx(0.5, abs=1e-12)
    assert found.measured["loss ratio at the largest width, rate 0.02"] == pytest.approx(128**-0.3, rel=1e-12)
    assert found.measured["trend of the log ratio, rate 0.05"] == pytest.approx(-0.3, abs=1e-12)
    # From 0.1 at λ to 0.4 at 4 λ the loss has doubled half-way: at 2 λ, which is ∝ d.
    key = "exponent of d in the ratio at which the tuned loss doubles"
    assert found.measured[key] == pytest.approx(1, abs=1e-12)
    assert "λ = 32, 128, 512" in found.statement
    assert "18 of 18 exponents" in found.statement
    assert set(found.table["panel"]) == {"widths", "tuned"}
    assert set(found.table["rate"].dropna()) == {0.02, 0.05, 0.1}


@pytest.mark.parametrize(
    ("rule", "exponents"),
    [
        ("ratio", (0.2, 0.0, 0.0)),  # features grow with λ ∝ d as well
        ("ratio", (0.0, -0.2, 0.0)),  # it learns less
        ("equal-slow", (0.0, 0.0, 0.3)),  # one rate does not learn less
        ("equal-fast", (0.0, 0.0, 0.0)),  # nor have its features grown
        ("equal-slow", (0.0, -1.0, 0.0)),  # the ratio gains no loss
        ("equal-slow", (0.0, -1.0, -0.3)),  # it costs loss
        ("equal-fast", (float("nan"), 0.0, 0.0)),  # it diverged
        ("ratio", (0.0, 0.0, float("nan"))),
    ],
)
@pytest.mark.parametrize("rates", [wide_layers.RATES, *((rate,) for rate in wide_layers.RATES)])
def test_lora_plus_fails_on_others_at_any_rate(
    rule: str, exponents: tuple[float, float, float], rates: tuple[float, ...]
) -> None:
    wrong = powers({rate: {**RIGHT, rule: exponents} for rate in rates})
    assert not lora_plus.judge(wrong, valley(16, 64, 256)).passed


def test_lora_plus_says_what_features_that_grow_cost() -> None:
    free = lora_plus.judge(powers(), valley(16, 64, 256))
    # √128 = 11.3 times the features, and by `RIGHT` the same loss.
    assert "changes the features 11, 11, 11 times as much as λ = 128" in free.statement
    assert "leaves 1.00 (1.00 to 1.00), 1.00 (1.00 to 1.00), 1.00 (1.00 to 1.00) times its loss" in free.statement
    dear = lora_plus.judge(powers({0.05: {**RIGHT, "equal-fast": (0.5, 0.0, 0.1)}}), valley(16, 64, 256))
    key = "loss ratio equal-fast to ratio, rate "
    assert dear.measured[f"{key}0.05"] == pytest.approx(128**0.1, rel=1e-12)
    assert dear.measured[f"{key}0.1"] == pytest.approx(1, rel=1e-12)
    assert dear.passed  # reported, not judged


def test_lora_plus_fails_where_a_rate_a_rule_or_a_width_is_missing() -> None:
    whole, tuned = powers(), valley(16, 64, 256)
    for column, value in (("rate", 0.05), ("rule", "equal-fast"), ("rule", "ratio"), ("dim", 8192), ("dim", 64)):
        assert not lora_plus.judge(whole[whole[column] != value], tuned).passed, (column, value)


def test_narrow_widths_take_no_part_in_the_exponents() -> None:
    table = powers()
    narrow = ~table["dim"].isin(lora_plus.FIT_DIMS)
    table.loc[narrow, ["features", "output"]] *= 3.0
    assert lora_plus.judge(table, valley(16, 64, 256)).passed
    # In the comparison of losses they do. Without a gain there, log ratios are 0, 0, 0, 0 and −0.3 log(d/64).
    table.loc[narrow, "loss"] = 0.1
    widths = np.log2(np.array(wide_layers.DIMS) / 64)
    logs = np.where(widths < 4, 0, -0.3 * widths)
    found = lora_plus.judge(table, valley(16, 64, 256)).measured["trend of the log ratio, rate 0.05"]
    assert found == pytest.approx(np.cov(widths, logs)[0, 1] / np.var(widths, ddof=1), rel=1e-12)


def test_the_tuned_comparison_decides_nothing_and_says_where_it_has_no_end() -> None:
    endless = valley(4096, 4096, 4096)
    found = lora_plus.judge(powers(), endless)
    assert found.passed
    assert np.isnan(found.measured["exponent of d in the ratio at which the tuned loss doubles"])


def test_a_step_of_the_widths_against_torch() -> None:
    lora = wide_layers.measure(dims=(64,), seeds=(3,), rates=(0.05,)).set_index("rule")
    # All rules are one at the smallest width.
    np.testing.assert_array_equal(lora.loc["ratio"].to_numpy(), lora.loc["equal-fast"].to_numpy())
    np.testing.assert_array_equal(lora.loc["ratio"].to_numpy(), lora.loc["equal-slow"].to_numpy())
    problem = wide_layers.draw_maps(64, (3,))
    inputs, target = torch.tensor(problem.design[0]), torch.tensor(problem.targets[0])
    a = torch.tensor(draw_first_factor(64, 8, np.random.default_rng([3, 64])), requires_grad=True)
    b = torch.zeros(8, 16, dtype=torch.float64, requires_grad=True)
    start = a.detach().clone()
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    losses, shares = [], []
    for step in range(wide_layers.NUM_STEPS + 1):
        loss = (inputs @ (2 * a @ b - target)).square().sum() / 2 / 32
        losses.append(loss.item())
        if step == wide_layers.NUM_STEPS:
            break
        before = a.detach().clone(), b.detach().clone()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            change = inputs @ (a @ b - before[0] @ before[1])
            own = inputs @ (a - before[0]) @ before[1], inputs @ before[0] @ (b - before[1])
            shares.append([((part * change).sum() / change.square().sum()).item() for part in own])
    row = lora.loc["ratio"]
    with torch.no_grad():
        # 1e-9: ε = 1e-8 in the denominators takes part in either, but roots and sums are rounded in another order.
        assert row["features"] == pytest.approx((inputs @ (a - start)).square().mean().sqrt().item(), rel=1e-9)
        assert row["output"] == pytest.approx((inputs @ (2 * a @ b)).square().mean().sqrt().item(), rel=1e-9)
    assert row["loss"] == pytest.approx(losses[-1] / losses[0], rel=1e-9)
    assert [row["share_A"], row["share_B"]] == pytest.approx(np.mean(shares[1:], axis=0).tolist(), rel=1e-9)


@pytest.mark.parametrize("factor", [0.25, 8.0, 3.0])
def test_a_ratio_of_rates_is_a_size_of_the_first_factor(factor: float) -> None:
    problem = wide_layers.draw_maps(12, (0, 1))
    plain = wide_layers.start_chains(problem, (0, 1), 0.02, 0.05)
    scaled = wide_layers.start_chains(problem, (0, 1), 0.02 * factor, 0.05 / factor)
    scaled = dataclasses.replace(scaled, factors=[factor * scaled.factors[0], scaled.factors[1]])
    adam = OptimizerSettings("adam", epsilon=1e-300)  # as good as none, but for 0/0
    found = [train_chains(problem, stack, adam, 12) for stack in (plain, scaled)]
    # Rounding of 12 steps, each of which a sign that flips at 0 would change by 100 %: none has.
    np.testing.assert_allclose(found[1].loss, found[0].loss, rtol=1e-10)
    np.testing.assert_allclose(found[1].factors[0], factor * found[0].factors[0], rtol=1e-10, atol=1e-13)


def test_rates_are_tuned_on_seeds_of_their_own() -> None:
    assert not set(wide_layers.TUNING_SEEDS) & set(wide_layers.TUNED_SEEDS)
    found = wide_layers.measure_tuned(dims=(8,), ratios=(1.0, 4.0), seeds=(0, 1))
    problem = wide_layers.draw_maps(8, wide_layers.TUNING_SEEDS)
    for ratio, part in found.groupby("ratio"):
        losses = {
            mean: np.exp(np.log(wide_layers.train_at(problem, wide_layers.TUNING_SEEDS, mean, float(ratio))).mean())
            for mean in wide_layers.RATE_MEANS
        }
        assert set(part["rate_mean"]) == {min(losses, key=losses.__getitem__)}
        assert set(part["tuning_loss"]) == {min(losses.values())}


# intruders


def counted(
    numbers: dict[str, list[int]], *, bound: tuple[int, int] = (-1, 1), steps: float = 9.0
) -> intruders.Measured:
    """What `measure` returns for so many intruders of each method in each seed, all in one module.

    Their cosine is 0.1, that of the others 1. The audit's bounds are the number with `bound` added.
    """
    vectors, bounds = [], []
    for method, of_seeds in numbers.items():
        for seed, number in enumerate(of_seeds):
            for place in range(20):
                cosine = 0.1 if place < number else 1.0
                vectors.append([method, seed, steps, "q_proj", place + 1, cosine])
            if method != intruders.FULL:
                bounds.append([method, seed, "q_proj", number + bound[0], number + bound[1]])
    return intruders.Measured(
        pd.DataFrame(vectors, columns=["method", "seed", "steps", "module", "place", "cosine"]),
        pd.DataFrame(bounds, columns=["method", "seed", "module", "lower", "upper"]),
    )


NUMBERS = {intruders.FULL: [0, 1, 0], "lora-1": [12, 15, 9], "lora-4": [4, 5, 3]}


def test_intruders_pass_where_only_lora_has_them() -> None:
    found = intruders.judge(counted(NUMBERS))
    assert found.passed
    assert found.measured["intruders lora-1"] == 12
    assert found.measured[f"intruders {intruders.FULL}"] == pytest.approx(1 / 3)
    counts = found.table[found.table["panel"] == "counts"].set_index(["method", "seed"])["count"]
    assert counts.to_dict() == {(m, s): n for m, of_seeds in NUMBERS.items() for s, n in enumerate(of_seeds)}
    curve = found.table[(found.table["panel"] == "thresholds") & (found.table["method"] == "lora-1")]
    assert curve["epsilon"].min() > 0.1
    assert set(curve["count"]) == {12, 15, 9}


@pytest.mark.parametrize(
    "measured",
    [
        counted({**NUMBERS, intruders.FULL: [12, 15, 9]}),  # full fine-tuning has as many
        counted({**NUMBERS, intruders.FULL: [1, 1, 1]}),  # more than a tenth of 8, the mean of both ranks
        counted({**NUMBERS, "lora-1": [40, 0, 40], "lora-4": [4, 1, 7]}),  # in one seed fewer than full fine-tuning
        counted({**NUMBERS, "lora-1": [0, 0, 0], "lora-4": [0, 0, 0]}),
        counted(NUMBERS, bound=(1, 2)),  # the audit's bounds miss it
        counted(NUMBERS, bound=(-2, -1)),
        counted(NUMBERS, steps=float("nan")),  # the loss was never reached
        counted({intruders.FULL: [0, 0, 0]}),  # there is no LoRA
    ],
)
def test_intruders_fail_otherwise(measured: intruders.Measured) -> None:
    assert not intruders.judge(measured).passed


def test_a_rank_that_alone_would_fail_is_named() -> None:
    assert "Alone" not in intruders.judge(counted(NUMBERS)).statement
    found = intruders.judge(counted({**NUMBERS, "lora-4": [4, 1, 7]}))
    assert found.passed
    assert "Alone, lora-4 would not" in found.statement


def test_how_wide_the_bounds_are_is_said() -> None:
    # 12 and 4 in the mean, 8 together.
    narrow = intruders.judge(counted(NUMBERS)).statement
    assert (
        "they are 11.0 to 13.0 of lora-1, 3.0 to 5.0 of lora-4; of a mean number of 8.0 their mean width is 2.0."
        in narrow
    )
    wide = intruders.judge(counted(NUMBERS, bound=(-3, 6))).statement
    assert "their mean width is 9.0, more than that number, so that holding it is a weak test." in wide
    assert "width" not in intruders.judge(counted({intruders.FULL: [0, 0, 0]})).statement


def test_intruders_fail_where_bounds_are_missing() -> None:
    whole = counted(NUMBERS)
    assert not intruders.judge(dataclasses.replace(whole, bounds=whole.bounds.iloc[1:])).passed


def test_cosines_of_a_weight_with_its_start() -> None:
    start = np.diag([4.0, 3.0, 2.0, 1.0])
    same = intruders.compare({"layer": start}, {"layer": 2 * start})
    np.testing.assert_allclose(same["cosine"], 1, rtol=1e-12)
    assert same["place"].tolist() == [1, 2, 3, 4]
    # 10⁹ e₁ vᵀ has v = (1, 1, 1, 1)/2 as its first direction of the outputs, and every cosine with W₀'s is 1/2.
    changed = start + 1e9 * np.outer([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5])
    # W₀ turns it by no more than 4/10⁹.
    assert intruders.compare({"layer": start}, {"layer": changed})["cosine"][0] == pytest.approx(0.5, abs=1e-8)


def test_effective_weights_are_those_that_peft_merges() -> None:
    model = adapt_model(0, r=2, lora_alpha=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found = intruders._weights(model)
    merged = intruders._weights(model.merge_and_unload())
    assert len(found) == 20
    assert set(found) == set(merged)
    assert found["model.layers.0.mlp.up_proj"].shape == (160, 432)
    for name, weight in found.items():
        np.testing.assert_allclose(weight, merged[name], rtol=1e-5, atol=1e-5)  # PEFT merges in float32


def test_the_layers_trained_in_full_are_those_that_lora_adapts() -> None:
    names = {name for name, p in intruders._prepare(intruders.FULL, 0).named_parameters() if p.requires_grad}
    assert {name.removesuffix(".weight") for name in names} == set(intruders._weights(adapt_model(0, r=1)))


def test_training_that_does_not_get_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intruders, "MAX_STEPS", 2)
    monkeypatch.setattr(intruders, "NUM_AVERAGED", 2)
    monkeypatch.setattr(intruders, "BATCH_SIZE", 2)
    assert np.isnan(intruders._train(adapt_model(0, r=1), 1e-3, 1))
    monkeypatch.setattr(intruders, "LOSS", 100.0)
    assert intruders._train(adapt_model(0, r=1), 1e-3, 1) == 2


# What they share


def test_batches_hold_each_record_once_before_any_twice() -> None:
    count = len(prepare_sums().train)
    size = count // 4
    batches = list(draw_batches(5, 5, size))
    again = next(iter(draw_batches(5, 1, size)))
    assert torch.equal(batches[0]["input_ids"], again["input_ids"])

    def texts(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
        pad = prepare_sums().pad_token_id
        return [tuple(t for t in row if t != pad) for row in batch["input_ids"].tolist()]

    first_pass = sorted(text for batch in batches[:4] for text in texts(batch))
    known = sorted(tuple(prepare_sums().train[i]["input_ids"].tolist()) for i in range(4 * size))
    assert first_pass == known
    assert texts(batches[4]) != texts(batches[0])


# weight-decay


def decayed(change: Callable[[int, int], float] = lambda count, place: 0.0) -> pd.DataFrame:
    """A table as `measure` makes it, of the predicted singular values; `change` is added to those of seed 1."""
    rows = [
        [method, count, seed, step, place, sigma + (change(count, place) if seed and step == 9 else 0.0)]
        for method, count in weight_decay.METHODS.items()
        for seed in (0, 1)
        for step in (3, 9)
        for place in range(1, 9)
        for sigma in [weight_decay.predict_sigma([*weight_decay.TARGET, 0.0][place - 1], count, weight_decay.DECAY)]
    ]
    return pd.DataFrame(rows, columns=["method", "num_factors", "seed", "step", "place", "sigma"])


def test_singular_values_under_decay_by_hand() -> None:
    assert weight_decay.predict_sigma(3.0, 2, 0.1) == pytest.approx(2.9, abs=1e-15)
    assert weight_decay.predict_sigma(0.05, 2, 0.1) == 0
    # With four factors σ − t + λ/√σ = 0: σ = 1/4 at t = 1/4 + 2 λ.
    assert weight_decay.predict_sigma(0.25 + 0.2, 4, 0.1) == pytest.approx(0.25, rel=1e-12)
    # Its smallest t with a root is 3 (λ/2)^(2/3), where σ = (λ/2)^(2/3).
    threshold = 3 * 0.05 ** (2 / 3)
    assert weight_decay.predict_sigma(threshold * (1 - 1e-9), 4, 0.1) == 0
    # The slope is flat there: its two roots part like the square root of the distance.
    assert weight_decay.predict_sigma(threshold * (1 + 1e-9), 4, 0.1) == pytest.approx(threshold / 3, rel=1e-3)
    assert weight_decay.predict_sigma(0.0, 5, 0.1) == 0
    assert weight_decay.predict_sigma(0.7, 5, 0.0) == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("num_factors", [2, 3, 5])
def test_the_root_is_where_the_penalised_loss_is_smallest_nearby(num_factors: int) -> None:
    grid = np.linspace(1e-4, 3.0, 300_000)
    for target in (0.7, 1.0, 2.0):
        values = (grid - target) ** 2 / 2 + 0.1 * num_factors / 2 * grid ** (2 / num_factors)
        inside = np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])) + 1
        found = weight_decay.predict_sigma(target, num_factors, 0.1)
        assert found == pytest.approx(grid[inside[-1]], abs=2e-5)  # two steps of the grid


def test_weight_decay_passes_on_the_prediction_alone() -> None:
    found = weight_decay.judge(decayed())
    assert found.passed
    assert [found.measured[f"rank, {count} factors"] for count in (2, 3, 5)] == [6, 5, 4]


@pytest.mark.parametrize(
    ("count", "place", "change"),
    [(2, 1, 0.002), (3, 5, -0.2), (5, 5, 0.3), (5, 8, 0.002), (3, 1, float("nan"))],
)
def test_weight_decay_fails_on_another_singular_value(count: int, place: int, change: float) -> None:
    wrong = decayed(lambda *at: change if at == (count, place) else 0.0)
    assert not weight_decay.judge(wrong).passed


def test_weight_decay_fails_without_one_of_the_depths() -> None:
    whole = decayed()
    assert not weight_decay.judge(whole[whole["num_factors"] < 5]).passed


def test_decay_of_a_chain_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_decay, "NUM_STEPS", 300)
    table = weight_decay.measure(methods=("moslora-8-identity",), seeds=(0,))
    last = table[table["step"] == 300].sort_values("place")["sigma"].to_numpy()
    # What is left of the factors' imbalance, exp(−2 λ η 300) = 17 % of it at the start, costs 2e-5. Without decay
    # the value would be 3, and with one factor fewer 2.9.
    assert last[0] == pytest.approx(weight_decay.predict_sigma(3.0, 3, 0.1), rel=1e-4)
    assert table["num_factors"].eq(3).all()
