"""What presets and chosen measures record in real training, against dense twins of the same model.

The twin of a step is a copy of the model whose frozen weights take gradients: it shows the gradient G of the full
weight and the inputs X of each layer. Recorded columns are float32, 6e-8 relative; a comparison with float32 products
of the twin is good to 1e-5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from linchain_analysis import Tracker, load_run, method_config
from linchain_analysis.auditing import apply_measures
from linchain_analysis.errors import InputError
from linchain_analysis.measures import registry
from linchain_analysis.measures.cores import Cores
from linchain_analysis.measures.noise import gradient_noise
from linchain_analysis.measures.registry import all_measures, measure
from linchain_analysis.probes import Chain, find_chains
from linchain_analysis.runs import Run, read_snapshots
from linchain_analysis.tracking.measuring import Measuring
from linchain_analysis.tracking.presets import select
from linchain_analysis.vocabulary import Column

Array = NDArray[np.float64]

TARGETS = ["q_proj", "v_proj", "down_proj"]
SAMPLED = {
    "gradient_capture",
    "gradient_preconditioned_cosine",
    "full_grad_norm",
    "data_weighted_spectrum",
    "data_weighted_effective_rank",
    "preconditioner_largest",
    "preconditioner_condition",
    "preconditioner_rank",
    "preconditioner_effective_rank",
}
FULL = {
    "steps": {"noise_gradient_square", "noise_trace", "noise_scale"},
    "modules": SAMPLED
    | {
        "chain_condition",
        "numerical_rank",
        "delta_update_numerical_rank",
        "order_ratios",
        "first_order_share",
        "interaction_ratio",
        "first_order_cosine",
        "preconditioned_cosine",
        "preconditioned_share",
        "relative_delta",
        "relative_update",
    },
    "factors": {
        "condition",
        "prefix_condition",
        "suffix_condition",
        "grad_spectrum",
        "grad_effective_rank",
        "own_share",
        "own_cosine",
    },
    "links": {"balance_drift", "imbalance"},
}


# --- training --------------------------------------------------------------------------------------------------------


def adapted(method: str = "linchain-3-4", *, layers: int = 1, b: float = 0.0, **overrides: Any) -> nn.Module:
    """A small llama; with `b`, one whose B is not zero any more."""
    torch.manual_seed(1)
    base = small_models.llama(num_hidden_layers=layers)
    model = get_peft_model(base, method_config(method, TARGETS, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if b and "lora_B" in name:
                parameter.normal_(std=b)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr)


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=lr)


def train(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_steps: int = 3,
    before: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> Run:
    """Train under a tracker and open the run; `before` is called before each step."""
    with Tracker(model, optimizer, path, **{"strict": True, **options}):
        for step in range(1, num_steps + 1):
            before(step)
            optimizer.zero_grad()
            model(**small_models.batch("llama", seed=step)).loss.backward()
            optimizer.step()
    return load_run(path)


# --- the dense twin --------------------------------------------------------------------------------------------------


@dataclass
class Dense:
    """What a copy of the model shows of one layer in one step.

    Attributes:
        gradient: G (d_in, d_out).
        inputs: X (tokens, d_in).
        factors: In chain view, before the step.
        weight: W_0 (d_in, d_out).
        scale: Of the product.
    """

    gradient: Array
    inputs: Array
    factors: list[Array]
    weight: Array
    scale: float
    factor_gradients: list[Array] = field(default_factory=list)

    @property
    def delta(self) -> Array:
        return self.scale * reduce(np.matmul, self.factors)


def factor_views(chain: Chain) -> list[Array]:
    return [view(factor, factor.parameter.detach()) for factor in chain.factors]


def view(factor: Any, tensor: torch.Tensor) -> Array:
    stored = factor.matrix(tensor).double().numpy().copy()  # float64 models would share their memory
    return stored.T if factor.transposed else stored


def look(model: nn.Module, batch: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, Dense]:
    """Run one backward pass of loss · `scale` on a copy whose frozen weights take gradients."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()  # a copy has the tracker's as well
    chains = find_chains(twin)
    seen: dict[str, torch.Tensor] = {}
    for chain in chains:
        chain.adapted.register_forward_hook(lambda _, inputs, __, name=chain.module: seen.update({name: inputs[0]}))
        chain.base_weight.requires_grad_(True)
    (twin(**batch).loss * scale).backward()
    return {
        chain.module: Dense(
            gradient=_from_input_to_output(chain, chain.base_weight.grad),
            inputs=seen[chain.module].detach().double().flatten(0, -2).numpy(),
            factors=factor_views(chain),
            weight=_from_input_to_output(chain, chain.base_weight.detach()),
            # With the frozen weight trained the chain would say that its product is not the change.
            scale=float(chain.adapted.scaling[chain.adapter]),
            factor_gradients=[view(f, f.parameter.grad) for f in chain.factors],
        )
        for chain in chains
    }


def _from_input_to_output(chain: Chain, weight: torch.Tensor) -> Array:
    stored = weight.double().numpy()
    return stored if type(chain.adapted.get_base_layer()).__name__ == "Conv1D" else stored.T


def product(factors: list[Array]) -> Array:
    return reduce(np.matmul, factors)


def sides(factors: list[Array]) -> list[tuple[Array, Array]]:
    """L_i and R_i of each factor."""
    d_in, d_out = len(factors[0]), factors[-1].shape[1]
    return [
        (product([np.eye(d_in), *factors[:i]]), product([*factors[i + 1 :], np.eye(d_out)]))
        for i in range(len(factors))
    ]


def captured(dense: Dense) -> float:
    """‖Π_T G‖/‖G‖ by orthonormal bases of the columns of A W1 … Wn and of the rows of W1 … Wn B."""
    left, right = sides(dense.factors)[-1][0], sides(dense.factors)[0][1]
    width = min(factor.shape[1] for factor in dense.factors[:-1])
    u = np.linalg.svd(left)[0][:, :width]
    rank = int((np.linalg.svd(right, compute_uv=False) > 1e-12).sum())  # 0 before the first step
    v = np.linalg.svd(right)[2][: min(rank, width)].T
    g = dense.gradient
    inside = u @ u.T @ g
    return float(np.linalg.norm(inside + (g - inside) @ v @ v.T) / np.linalg.norm(g))


def preconditioned(dense: Dense) -> Array:
    """P(G) = Σ L_i L_iᵀ G R_iᵀ R_i."""
    return sum(left @ left.T @ dense.gradient @ right.T @ right for left, right in sides(dense.factors))


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def row(frame: pd.DataFrame, step: int, module: str) -> pd.Series:
    (found,) = [r for _, r in frame[(frame["step"] == step) & (frame["module"] == module)].iterrows()]
    return found


# --- one run that records everything ---------------------------------------------------------------------------------


@dataclass
class Watched:
    run: Run
    before: list[dict[str, Dense]]  # by step − 1
    after: list[dict[str, list[Array]]]
    gradients: list[dict[str, dict[str, Array]]]  # of each factor, of the model itself


@pytest.fixture(scope="module", params=["linchain-3-4", "linchain-2-8", "lora-4"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Five steps of AdamW with preset `full`, everything sampled at every step, snapshots at 1, 3 and 5."""
    model = adapted(request.param, layers=2)
    optimizer = adamw(model)
    chains = find_chains(model, optimizer)
    before: list[dict[str, Dense]] = []
    after: list[dict[str, list[Array]]] = []
    gradients: list[dict[str, dict[str, Array]]] = []
    path = tmp_path_factory.mktemp("watched") / "run"
    options = {"sample_every": 1, "snapshot_every": 2, "gradients": "full"}
    with Tracker(model, optimizer, path, preset="full", strict=True, **options):
        for step in range(1, 6):
            batch = small_models.batch("llama", seed=step)
            before.append(look(model, batch))
            optimizer.zero_grad()
            model(**batch).loss.backward()
            gradients.append({c.module: {f.name: view(f, f.parameter.grad) for f in c.factors} for c in chains})
            optimizer.step()
            after.append({chain.module: factor_views(chain) for chain in chains})
    return Watched(load_run(path), before, after, gradients)


def every_row(watched: Watched) -> Iterator[tuple[int, str, pd.Series, Dense, list[Array]]]:
    modules = watched.run.modules
    for step, dense in enumerate(watched.before, start=1):
        for name, of_layer in dense.items():
            yield step, name, row(modules, step, name), of_layer, watched.after[step - 1][name]


def test_the_full_gradient_and_its_capture(watched: Watched) -> None:
    for _, _, recorded, dense, _ in every_row(watched):
        assert recorded["full_grad_norm"] == pytest.approx(np.linalg.norm(dense.gradient), rel=1e-5)
        assert recorded["gradient_capture"] == pytest.approx(captured(dense), rel=1e-5)
        along = cosine(dense.gradient, preconditioned(dense))
        assert recorded["gradient_preconditioned_cosine"] == pytest.approx(along, rel=1e-5)


def test_what_delta_does_to_the_inputs(watched: Watched) -> None:
    """Delta as the forward pass had it: zero at the first step."""
    for step, _, recorded, dense, _ in every_row(watched):
        sigma = recorded["data_weighted_spectrum"]
        seen = dense.inputs @ dense.delta / np.sqrt(len(dense.inputs))
        expected = np.linalg.svd(seen, compute_uv=False)[: len(sigma)]
        np.testing.assert_allclose(sigma, expected, rtol=0, atol=1e-5 * expected[0])
        assert np.isnan(recorded["data_weighted_effective_rank"]) == (step == 1)


def test_orders_are_the_terms_of_the_step(watched: Watched) -> None:
    """The terms by order, from ∏(F_i + ε dF_i) at as many ε as there are coefficients; their sum is the update."""
    for _, name, recorded, dense, after in every_row(watched):
        change = [new - old for old, new in zip(dense.factors, after, strict=True)]
        count = len(change)
        points = np.cos(np.pi * (np.arange(count + 1) + 0.5) / (count + 1))  # Chebyshev's, for a good condition
        values = np.stack(
            [product([f + e * d for f, d in zip(dense.factors, change, strict=True)]).ravel() for e in points]
        )
        terms = np.linalg.solve(np.vander(points, increasing=True), values)[1:]
        update = product(after) - product(dense.factors)
        np.testing.assert_allclose(terms.sum(axis=0), update.ravel(), rtol=0, atol=1e-12)
        size = np.linalg.norm(update)
        ratios = np.linalg.norm(terms, axis=1) / size
        np.testing.assert_allclose(recorded["order_ratios"], ratios, rtol=1e-5, atol=1e-6)
        share = float(terms[0] @ update.ravel()) / size**2
        assert recorded["first_order_share"] == pytest.approx(share, rel=1e-5)
        higher = np.linalg.norm(update.ravel() - terms[0]) / size
        assert recorded["interaction_ratio"] == pytest.approx(higher, rel=1e-5, abs=1e-6)
        factors = watched.run.factors
        own = factors[(factors["step"] == recorded["step"]) & (factors["module"] == name)]["own_share"]
        assert own.sum() == pytest.approx(share, rel=1e-5)


def test_sizes_and_spectra_beside_the_frozen_weight_and_the_gradients(watched: Watched) -> None:
    factors = watched.run.factors
    for step, name, recorded, dense, after in every_row(watched):
        base = np.linalg.norm(dense.weight)
        delta, update = dense.scale * product(after), dense.scale * (product(after) - product(dense.factors))
        assert recorded["relative_delta"] == pytest.approx(np.linalg.norm(delta) / base, rel=1e-5)
        assert recorded["relative_update"] == pytest.approx(np.linalg.norm(update) / base, rel=1e-5)
        own = factors[(factors["step"] == step) & (factors["module"] == name)]
        for sigma, gradient in zip(own["grad_spectrum"], dense.factor_gradients, strict=True):
            expected = np.linalg.svd(gradient, compute_uv=False)
            length = min(len(expected), len(sigma))
            np.testing.assert_allclose(sigma[:length], expected[:length], rtol=0, atol=1e-5 * expected[0])
            assert not sigma[length:].any()


def test_the_preconditioned_share_is_that_of_the_full_gradient(watched: Watched) -> None:
    """scale² P(G) is made of the factors' gradients alone, and yet it is the P of the twin's G."""
    for _, _, recorded, dense, after in every_row(watched):
        update = product(after) - product(dense.factors)
        along = -cosine(update, preconditioned(dense))
        assert recorded["preconditioned_cosine"] == pytest.approx(along, abs=1e-5)
        assert recorded["preconditioned_share"] == pytest.approx(along**2, abs=1e-5)


def test_balance_from_the_factors_themselves(watched: Watched) -> None:
    """AdamW has one learning rate here, so it drops out."""
    links = watched.run.links
    for step, name, _, _, after in every_row(watched):
        start = watched.before[0][name].factors
        own = links[(links["step"] == step) & (links["module"] == name)]
        assert len(own) == len(after) - 1
        for (left, right), (old_left, old_right), drift in zip(
            pairwise(after), pairwise(start), own["balance_drift"], strict=True
        ):
            moved = (left.T @ left - right @ right.T) - (old_left.T @ old_left - old_right @ old_right.T)
            size = np.linalg.norm(left.T @ left) + np.linalg.norm(right @ right.T)
            assert drift == pytest.approx(np.linalg.norm(moved) / size, rel=1e-5)


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshots_are_taken_when_they_are_due_and_keep_whole_gradients(watched: Watched) -> None:
    snapshots = list(read_snapshots(watched.run))
    assert sorted({snapshot.step for snapshot in snapshots}) == [1, 3, 5]
    for snapshot in snapshots:
        for module in snapshot.modules:
            whole, gradients = snapshot.whole_gradients[module], watched.gradients[snapshot.step - 1][module]
            assert whole.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert whole[name].dtype == np.float32
                np.testing.assert_array_equal(whole[name], gradient)


def test_measures_of_a_snapshot_are_those_that_were_recorded(watched: Watched) -> None:
    chosen = [found for found in all_measures().values() if found.level == "full"]
    found = apply_measures(watched.run, [each.name for each in chosen])
    keys = {"modules": ["step", "module"], "factors": ["step", "module", "factor"], "links": ["step", "module", "link"]}
    compared = 0
    for table, again in found.items():
        recorded = getattr(watched.run, table).astype(dict.fromkeys(keys[table][1:], str))
        both = again.merge(recorded, on=keys[table], suffixes=("_again", ""))
        assert len(both) == len(again) > 0
        for column in FULL[table]:
            for once, twice in zip(both[column], both[f"{column}_again"], strict=True):
                np.testing.assert_allclose(once, np.float32(twice), rtol=1e-6, atol=1e-30, err_msg=column)
                compared += 1
    assert compared > 500


def test_ranks_of_a_snapshot_are_those_of_the_stored_spectra(watched: Watched) -> None:
    names = [each.name for each in all_measures().values() if each.level == "reading"]
    again = apply_measures(watched.run, names)["modules"]
    read = watched.run.read("modules", ["step", "module", *names]).astype({"module": str})
    both = again.merge(read, on=["step", "module"], suffixes=("_again", ""))
    assert len(both) == len(again) > 0
    for name in names:
        # From spectra in float32; a count can fall either side of its limit by that.
        np.testing.assert_allclose(both[name], both[f"{name}_again"], rtol=1e-5, err_msg=name)


def test_snapshots_without_a_preset_that_has_them(tmp_path: Path) -> None:
    model = adapted()
    run = train(tmp_path / "run", model, sgd(model), 4, preset="light", snapshot_every=3)
    assert sorted({snapshot.step for snapshot in read_snapshots(run)}) == [1, 4]
    assert not any(snapshot.whole_gradients[name] for snapshot in read_snapshots(run) for name in snapshot.modules)
    without = train(tmp_path / "without", adapted(), sgd(adapted()), 1, preset="standard")
    assert list(read_snapshots(without)) == []


# --- presets and chosen measures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["light", "standard", "full"])
def test_what_a_preset_records(tmp_path: Path, preset: str) -> None:
    model = adapted()
    run = train(tmp_path / "run", model, adamw(model), preset=preset)
    for table, names in FULL.items():
        fixed = {"balance_drift"} if table == "links" else set()
        recorded = names & set(getattr(run, table).columns)
        assert recorded == (names if preset == "full" else fixed), table
    assert (len(run.links) > 0) == (preset == "full")
    assert bool(run.manifest.measures) == (preset == "full")
    assert run.manifest.preset == preset
    modules, factors = run.modules, run.factors
    for name in ("delta_norm", "delta_update_norm"):
        assert (modules[name] > 0).all()
    later = factors[factors["step"] == 3]  # at first only B has a gradient
    for name in ("grad_norm", "update_norm", "weight_norm", "update_ratio"):
        assert (later[name] > 0).all()
    has_more = preset != "light"
    assert modules["spectrum"].notna().all() == has_more
    assert modules["effective_rank"].notna().all() == has_more
    assert modules["descent_cosine"].notna().all() == has_more
    assert later["grad_cosine_previous"].notna().all() == has_more
    if preset == "full":
        assert run.links["balance_drift"].notna().all()
        first = modules[modules["step"] == 1]
        defined = SAMPLED - {"data_weighted_effective_rank"}  # there is no delta yet
        assert first[sorted(defined)].notna().all().all()


@pytest.mark.parametrize(
    ("chosen", "measures", "columns"),
    [
        (["orders"], ("orders",), {"order_ratios", "first_order_share", "interaction_ratio", "first_order_cosine"}),
        (["own_share"], ("orders",), {"order_ratios", "first_order_share", "interaction_ratio", "first_order_cosine"}),
        (["chain_condition", "conditioning"], ("conditioning",), {"chain_condition"}),
        (["relative_size"], ("relative_size",), {"relative_delta", "relative_update"}),
        (["balance_drift"], ("balance",), set()),
        ([], (), set()),
    ],
)
def test_measures_by_name_or_by_column(
    tmp_path: Path, chosen: list[str], measures: tuple[str, ...], columns: set[str]
) -> None:
    model = adapted()
    run = train(tmp_path / "run", model, sgd(model), measures=chosen)
    assert run.manifest.measures == measures
    assert run.manifest.preset == "custom"
    assert set(run.modules.columns) & FULL["modules"] == columns
    assert (len(run.links) > 0) == ("balance" in measures)
    # With norms, and nothing else.
    assert (run.modules["delta_norm"] > 0).all()
    assert run.modules["spectrum"].isna().all()
    assert run.modules["descent_cosine"].isna().all()


@pytest.mark.parametrize(
    ("chosen", "spectra", "cosines"),
    [
        ("spectra", True, False),
        ("effective_rank", True, False),
        ("participation_ratio", True, False),  # computed on reading
        ("cosines", False, True),
        ("descent_cosine", False, True),
        ("norms", False, False),
        ("grad_norm", False, False),
    ],
)
def test_what_the_tracker_records_by_itself_can_be_chosen_too(
    tmp_path: Path, chosen: str, spectra: bool, cosines: bool
) -> None:
    model = adapted(b=0.02)
    run = train(tmp_path / "run", model, sgd(model), measures=[chosen])
    assert run.manifest.measures == ()
    assert run.modules["spectrum"].notna().all() == spectra
    assert run.modules["descent_cosine"].notna().all() == cosines
    if spectra:
        ratio = run.read("modules", ["participation_ratio"])["participation_ratio"]
        assert ((ratio >= 1) & (ratio <= 4)).all()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["ordres"], "did you mean 'orders'"),
        (["intraction_ratio"], "did you mean 'interaction_ratio'"),
        (["spectrums"], "did you mean 'spectr"),
        (["xyzzy"], "choose one of these"),
        ("orders", r"pass \['orders'\]"),
        ([lambda cores: {}], "mark it with the columns it fills in"),
    ],
)
def test_a_name_that_is_none_is_refused_before_training(tmp_path: Path, chosen: Any, expected: str) -> None:
    model = adapted("lora-4")
    with pytest.raises(InputError, match=expected):
        Tracker(model, sgd(model), tmp_path / "run", measures=chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"sample_every": 0}, {"snapshot_every": 0}, {"snapshot_every": True}])
def test_intervals_are_whole_numbers(tmp_path: Path, wrong: dict[str, Any]) -> None:
    model = adapted("lora-4")
    with pytest.raises(InputError, match="a number of steps ≥ 1"):
        Tracker(model, sgd(model), tmp_path / "run", **wrong)
    with pytest.raises(InputError, match="cores or full"):
        Tracker(model, sgd(model), tmp_path / "run", gradients="some")


# --- measures of the user's own --------------------------------------------------------------------------------------


@pytest.fixture
def own_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test marks is forgotten afterwards."""
    all_measures()
    monkeypatch.setattr(registry, "_FOUND", dict(registry._FOUND))


def column(name: str, table: Any = "modules", kind: Any = "float") -> Column:
    return Column(table, name, kind, "1", "a test", "")


@pytest.mark.usefixtures("own_measures")
def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    @measure(column("size_of_a"), column("all_sizes", "factors"), column("largest", kind="values"), level="named")
    def measure_sizes(cores: Cores) -> dict[str, Array]:
        """Take norms."""
        sizes = np.stack([np.linalg.norm(factor, axis=(1, 2)) for factor in cores.after], axis=1)
        return {"size_of_a": sizes[:, 0], "all_sizes": sizes, "largest": sizes[:, :2]}

    model = adapted("linchain-2-8")
    run = train(tmp_path / "run", model, sgd(model), measures=[measure_sizes, "cosines"])
    np.testing.assert_allclose(run.factors["all_sizes"], run.factors["weight_norm"], rtol=1e-6)
    of_a = run.factors[run.factors["factor"] == "A"]["weight_norm"]
    np.testing.assert_allclose(run.modules["size_of_a"], of_a, rtol=1e-6)
    np.testing.assert_allclose(np.stack(list(run.modules["largest"]))[:, 0], of_a, rtol=1e-6)
    # Not for those who did not ask.
    other = train(tmp_path / "full", model, sgd(model), preset="full")
    assert "size_of_a" not in other.modules.columns


@pytest.mark.usefixtures("own_measures")
@pytest.mark.parametrize("fault", ["raises", "shape", "nothing"])
def test_a_measure_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    calls = []

    @measure(column("shaky"), level="named")
    def measure_shaky(cores: Cores) -> dict[str, Array]:
        """Work once."""
        calls.append(len(cores))
        if len(calls) <= 2:  # two shapes of modules
            return {"shaky": np.ones(len(cores))}
        if fault == "raises":
            raise ZeroDivisionError("of the user's own")
        return {"shaky": np.ones((len(cores) + 1, 3))} if fault == "shape" else {}

    model = get_peft_model(small_models.llama(), method_config("linchain-3-4", ["q_proj", "down_proj"]))
    options = {"measures": [measure_shaky, "conditioning", "spectra"]}
    run = train(tmp_path / "run", model, sgd(model), 4, strict=False, **options)
    assert run.status == "complete"
    assert caplog.text.count("the measure shaky is left out from step 2 on") == 1
    assert ("ZeroDivisionError" if fault == "raises" else "correct its function") in caplog.text
    assert len(calls) == 3
    modules = run.modules
    assert (modules.loc[modules["step"] == 1, "shaky"] == 1).all()
    assert modules.loc[modules["step"] > 1, "shaky"].isna().all()
    assert modules["chain_condition"].notna()[modules["delta_norm"] > 0].all()
    assert modules["spectrum"].notna().all()

    del calls[:]
    with pytest.raises((ZeroDivisionError, InputError), match=r"user's own|correct its function"):
        train(tmp_path / "strict", model, sgd(model), 4, strict=True, **options)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "sample_every", "sampled"),
    [(1, 3, [1, 4, 7]), (2, 3, [2, 6]), (1, 50, [1]), (lambda step: step in (2, 3, 5, 7), 2, [2, 5, 7])],
)
def test_dear_measures_are_taken_at_sampled_steps(
    tmp_path: Path, every: Any, sample_every: int, sampled: list[int]
) -> None:
    model = adapted()
    run = train(tmp_path / "run", model, sgd(model), 7, preset="full", every=every, sample_every=sample_every)
    modules = run.modules
    for name in sorted(SAMPLED):
        # Before the first step there is no delta to have a rank.
        expected = [step for step in sampled if step > 1 or name != "data_weighted_effective_rank"]
        assert sorted(modules.loc[modules[name].notna(), "step"].unique()) == expected, name
    assert modules["order_ratios"].notna().all()
    assert modules["preconditioned_share"].notna().all()


def test_hooks_are_on_the_layers_for_sampled_steps_alone(tmp_path: Path) -> None:
    model = adapted()
    optimizer = sgd(model)
    layers = len(find_chains(model, optimizer))

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())

    seen = []
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=3, strict=True):
        for step in range(1, 8):
            seen.append(num_hooks())
            optimizer.zero_grad()
            model(**small_models.batch("llama", seed=step)).loss.backward()
            optimizer.step()
    assert seen == [layers if step in (1, 4, 7) else 0 for step in range(1, 8)]
    assert num_hooks() == 0


@pytest.mark.parametrize("when", ["closed at once", "closed between backward and step", "left by an exception"])
def test_no_hooks_are_left(tmp_path: Path, when: str) -> None:
    model = adapted()
    optimizer = sgd(model)
    tracker = Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1, strict=True)
    assert any(module._forward_hooks for module in model.modules())
    if when == "closed between backward and step":
        model(**small_models.batch("llama")).loss.backward()
    if when == "left by an exception":
        with pytest.raises(RuntimeError), tracker:
            raise RuntimeError("out of luck")
    tracker.close()
    assert not any(module._forward_hooks for module in model.modules())
    optimizer.step()


def test_a_fault_of_the_tracker_leaves_no_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    optimizer = sgd(model)
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1) as tracker:
        monkeypatch.setattr(tracker._recorder._reader, "read_gradients", lambda scale: 1 / 0)
        model(**small_models.batch("llama")).loss.backward()
        optimizer.step()
        assert not any(module._forward_hooks for module in model.modules())
    assert load_run(tmp_path / "run").status == "failed"


# --- balance and preconditioning under several optimisers ------------------------------------------------------------


def largest_drift(tmp_path: Path, lr: float, num_steps: int = 20) -> float:
    """Gradient descent in float64 over the same time lr · steps."""
    model = adapted(b=0.3).double()
    run = train(tmp_path / f"{lr:g}", model, sgd(model, lr), num_steps, measures=["balance"])
    links = run.links
    return float(links.loc[links["step"] == num_steps, "balance_drift"].max())


def test_gradient_descent_keeps_the_balance_and_large_steps_do_not(tmp_path: Path) -> None:
    """A step changes F_iᵀF_i − F_{i+1}F_{i+1}ᵀ by lr² times squares of gradients: 10 times the lr, 100 the drift."""
    small, medium, large = (largest_drift(tmp_path, lr) for lr in (1e-4, 1e-3, 1e-2))
    assert 0 < small < 1e-8
    # Gradients change a little on the way.
    assert medium / small == pytest.approx(100, rel=0.1)
    assert large / medium == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize("weighed", [True, False])
def test_different_learning_rates_are_part_of_the_balance(tmp_path: Path, weighed: bool) -> None:
    """What B gains with 16 times the rate is conserved as ‖A‖²/η_A − ‖B‖²/η_B, and not without the rates."""
    model = adapted("lora-4", b=0.3).double()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-4, loraplus_lr_ratio=16.0)
    start = {chain.module: factor_views(chain) for chain in find_chains(model)}
    run = train(tmp_path / "run", model, optimizer, 10, measures=["balance", "cosines"])
    last = run.links[run.links["step"] == 10].set_index("module")["balance_drift"]
    for chain in find_chains(model):
        (a, b), (old_a, old_b) = factor_views(chain), start[chain.module]
        eta = 1 / 16 if weighed else 1.0
        left, right = a.T @ a, eta * (b @ b.T)
        moved = np.linalg.norm((left - old_a.T @ old_a) - (right - eta * (old_b @ old_b.T)))
        drift = moved / (np.linalg.norm(left) + np.linalg.norm(right))
        if weighed:
            assert last[chain.module] == pytest.approx(drift, rel=1e-4)
            assert drift < 1e-7
        else:
            assert drift > 100 * last[chain.module]


def test_a_schedule_that_starts_at_zero(tmp_path: Path) -> None:
    """At rate 0 nothing moves, the drift is 0, and the weights of the rates are those of all other steps."""
    model = adapted("lora-4", b=0.3).double()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-4, loraplus_lr_ratio=16.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 3, 1.0))
    advance = {1: lambda: None}
    run = train(
        tmp_path / "run",
        model,
        optimizer,
        6,
        before=lambda step: advance.get(step, schedule.step)(),
        preset="full",
        sample_every=1,
    )
    assert run.steps["learning_rate"].iloc[0] == 0
    assert run.steps["learning_rate"].iloc[-1] == pytest.approx(1e-4)
    links = run.links
    assert (links.loc[links["step"] == 1, "balance_drift"] < 1e-14).all()  # sums in another order
    assert links["balance_drift"].between(0, 1e-6).all()
    imbalance = links.pivot_table(index="step", columns="module", values="imbalance", observed=True)
    np.testing.assert_allclose(imbalance.loc[1], imbalance.loc[2], rtol=1e-3)
    modules = run.modules
    still = modules[modules["step"] == 1]
    assert (still["delta_update_norm"] == 0).all()
    for name in ("preconditioned_share", "first_order_share", "interaction_ratio"):
        assert still[name].isna().all()
        assert modules.loc[modules["step"] > 1, name].notna().all()


@pytest.mark.parametrize("method", ["lora-4", "moslora-4", "linchain-3-4"])
def test_gradient_descent_follows_the_preconditioned_gradient_and_adam_does_not(tmp_path: Path, method: str) -> None:
    shares = {}
    for name, make in (("sgd", lambda m: sgd(m, 1e-4)), ("adam", lambda m: torch.optim.Adam(trained(m), lr=1e-4))):
        model = adapted(method, b=0.3).double()
        run = train(tmp_path / name, model, make(model), 4, measures=["preconditioned_share", "orders"])
        shares[name] = run.modules["preconditioned_share"]
        # To first order in small steps; what is left is of the order of lr.
        if name == "sgd":
            assert (run.modules["interaction_ratio"] < 1e-3).all()
    assert (shares["sgd"] > 1 - 1e-6).all()
    assert (shares["adam"] < 0.99).all()


def test_a_clipped_step_has_the_same_direction(tmp_path: Path) -> None:
    """Gradients are read before clipping, tokens are not touched by it."""
    runs = {}
    for clip in (None, 1e-3):
        model = adapted(b=0.3)
        optimizer = sgd(model)
        with Tracker(model, optimizer, tmp_path / str(clip), preset="full", sample_every=1, strict=True):
            model(**small_models.batch("llama")).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trained(model), clip)
            optimizer.step()
        runs[clip] = load_run(tmp_path / str(clip))
    free, clipped = runs[None], runs[1e-3]
    assert clipped.steps["clip_coef"].item() < 2e-2
    for name in ("full_grad_norm", "gradient_capture", "gradient_preconditioned_cosine"):
        np.testing.assert_array_equal(clipped.modules[name], free.modules[name])
    for once, twice in zip(clipped.factors["grad_spectrum"], free.factors["grad_spectrum"], strict=True):
        np.testing.assert_allclose(once, twice, rtol=1e-5, atol=1e-6 * twice[0])
    assert (clipped.modules["interaction_ratio"] < free.modules["interaction_ratio"]).all()
    assert (clipped.modules["preconditioned_share"] > 0.999).all()  # a small step


# --- accumulation, scaling, checkpointing, odd layers ----------------------------------------------------------------


def test_of_accumulated_passes_the_last_is_looked_at(tmp_path: Path) -> None:
    model = adapted(b=0.3)
    optimizer = sgd(model, 0.01)
    expected = []
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1, strict=True):
        for step in range(3):
            optimizer.zero_grad()
            for part in range(4):
                batch = small_models.batch("llama", seed=4 * step + part)
                dense = look(model, batch, 0.25)
                (model(**batch).loss / 4).backward()
            expected.append(dense)
            optimizer.step()
    modules = load_run(tmp_path / "run").modules
    for step, dense in enumerate(expected, start=1):
        for name, of_layer in dense.items():
            recorded = row(modules, step, name)
            assert recorded["full_grad_norm"] == pytest.approx(np.linalg.norm(of_layer.gradient), rel=1e-5)
            assert recorded["gradient_capture"] == pytest.approx(captured(of_layer), rel=1e-5)


@pytest.mark.parametrize("preset", ["full", "custom"])
def test_the_noise_scale_needs_accumulation_and_agrees_with_its_formula(tmp_path: Path, preset: str) -> None:
    options: dict[str, Any] = {"preset": "full"} if preset == "full" else {"measures": ["noise_scale"]}
    model = adapted("lora-4", b=0.3)
    optimizer = sgd(model, 0.01)
    expected = []

    def square() -> float:
        return float(sum(p.grad.double().square().sum() for p in trained(model) if p.grad is not None))

    with Tracker(model, optimizer, tmp_path / "run", strict=True, **options):
        for step in range(6):
            optimizer.zero_grad()
            count = 1 if step == 2 else 4
            squares = []
            for part in range(count):
                (model(**small_models.batch("llama", seed=4 * step + part)).loss / count).backward()
                squares.append(square())
            torch.nn.utils.clip_grad_norm_(trained(model), 1e-2)
            optimizer.step()
            if count > 1:
                noise = gradient_noise(squares[0] * count**2, squares[-1], 1, count)
                expected.append((float(noise.gradient_square), float(noise.noise_trace)))
            else:
                expected.append((np.nan, np.nan))
    steps = load_run(tmp_path / "run").steps
    # Norms are taken in float32 and squared, and the estimates subtract squares.
    size = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(steps[["noise_gradient_square", "noise_trace"]], expected, rtol=1e-5, atol=1e-5 * size)
    averages = pd.DataFrame(expected).ewm(alpha=0.01, ignore_na=True).mean()
    scale = averages[1] / averages[0].where(averages[0] > 0)
    scale[2] = np.nan
    np.testing.assert_allclose(steps["noise_scale"], scale, rtol=1e-4)


def test_without_accumulation_there_is_no_noise_scale(tmp_path: Path) -> None:
    model = adapted("lora-4")
    run = train(tmp_path / "run", model, sgd(model), preset="full")
    assert run.steps[["noise_gradient_square", "noise_trace", "noise_scale"]].isna().all().all()
    standard = train(tmp_path / "standard", model, sgd(model))
    assert "noise_scale" not in standard.steps.columns


@pytest.mark.parametrize("unscale", [True, False])
def test_the_scale_of_a_gradient_scaler_is_taken_out(tmp_path: Path, unscale: bool) -> None:
    runs = {}
    for enabled in (True, False):
        model = adapted(b=0.3)
        optimizer = sgd(model, 0.01)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=4096.0)
        path = tmp_path / str(enabled)
        options = {"sample_every": 1, "snapshot_every": 1, "gradients": "full"}
        with Tracker(model, optimizer, path, preset="full", strict=True, **options):
            for step in range(3):
                optimizer.zero_grad()
                for part in range(2):
                    loss = model(**small_models.batch("llama", seed=2 * step + part)).loss
                    scaler.scale(loss / 2).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        runs[enabled] = load_run(path)
    scaled, plain = runs[True], runs[False]
    assert (plain.modules["full_grad_norm"] > 1e-3).all()
    # The scale is a power of two: the same digits, until small numbers meet.
    for table, names in (
        ("modules", sorted(FULL["modules"])),
        ("factors", sorted(FULL["factors"])),
        ("links", ["balance_drift", "imbalance"]),
        ("steps", sorted(FULL["steps"])),
    ):
        for name in names:
            for once, twice in zip(getattr(scaled, table)[name], getattr(plain, table)[name], strict=True):
                np.testing.assert_allclose(once, twice, rtol=1e-4, atol=1e-6, err_msg=name)
    for once, twice in zip(read_snapshots(scaled), read_snapshots(plain), strict=True):
        for module in once.modules:
            for name, gradient in once.whole_gradients[module].items():
                np.testing.assert_allclose(gradient, twice.whole_gradients[module][name], rtol=1e-5, atol=1e-8)


def checkpointed(reentrant: bool | None) -> nn.Module:
    model = adapted(b=0.3, layers=2, lora_dropout=0.1)
    if reentrant is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


def disturbed(path: Path, reentrant: bool | None, *, track: bool) -> dict[str, Any]:
    """Three accumulated, clipped steps with dropout; everything that a tracker could disturb."""
    model = checkpointed(reentrant)
    optimizer = adamw(model)
    options = {"preset": "full", "sample_every": 1, "snapshot_every": 1, "gradients": "full", "strict": True}
    tracker = Tracker(model, optimizer, path, **options) if track else None
    torch.manual_seed(5)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            loss = model(**small_models.batch("llama", seed=2 * step + part)).loss / 2
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
        optimizer.step()
    if tracker:
        tracker.close()
    return {
        "losses": torch.stack(losses),
        "random": torch.get_rng_state(),
        **{name: value.detach().clone() for name, value in model.state_dict().items()},
        **{
            f"{key} of {index}": value
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        },
    }


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_training_is_bit_identical_with_everything_recorded(tmp_path: Path, reentrant: bool | None) -> None:
    without = disturbed(tmp_path / "run", reentrant, track=False)
    with_tracker = disturbed(tmp_path / "run", reentrant, track=True)
    assert without.keys() == with_tracker.keys()
    for name, value in without.items():
        assert torch.equal(value, with_tracker[name]), name
    assert (load_run(tmp_path / "run").modules["full_grad_norm"] > 0).all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_layers_are_seen_once(tmp_path: Path, reentrant: bool) -> None:
    """Their forward passes run twice; what they show is what they show without."""
    disturbed(tmp_path / "plain", None, track=True)
    disturbed(tmp_path / "again", reentrant, track=True)
    plain, again = (load_run(tmp_path / name).modules for name in ("plain", "again"))
    for name in ("full_grad_norm", "gradient_capture", "gradient_preconditioned_cosine"):
        np.testing.assert_allclose(again[name], plain[name], rtol=1e-5)
    for once, twice in zip(again["data_weighted_spectrum"], plain["data_weighted_spectrum"], strict=True):
        np.testing.assert_allclose(once, twice, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    ],
)
def test_layers_that_are_no_plain_linear_ones(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """GPT-2's Conv1D, which stores its weight the other way round, and a parameter that is adapted by its name."""
    torch.manual_seed(1)
    model = get_peft_model(small_models.BUILDERS[name](), method_config("linchain-2-4", **options)).eval()  # no dropout
    optimizer = adamw(model)
    twins: list[dict[str, Dense]] = []
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1, strict=True):
        for step in range(2):
            batch = small_models.batch(name, seed=step)
            twins.append(look(model, batch))
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    modules = load_run(tmp_path / "run").modules
    for step, twin in enumerate(twins, start=1):
        for module, dense in twin.items():
            recorded = row(modules, step, module)
            assert recorded["full_grad_norm"] == pytest.approx(np.linalg.norm(dense.gradient), rel=1e-5)
            assert recorded["gradient_capture"] == pytest.approx(captured(dense), rel=1e-5)
            along = cosine(dense.gradient, preconditioned(dense))
            assert recorded["gradient_preconditioned_cosine"] == pytest.approx(along, rel=1e-5)


class Calls(nn.Module):
    """One layer that is called twice and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(12, 12)
        self.once = nn.Linear(12, 6)
        self.never = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.once(x)  # without a gradient: is not counted
        return self.once(self.twice(torch.relu(self.twice(x)))).square().mean()


def test_a_layer_called_twice_has_no_number_rather_than_a_wrong_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Calls(), method_config("linchain-1-4", ["twice", "once", "never"]))
    optimizer = adamw(model)
    x = torch.randn(7, 12)
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
    modules = load_run(tmp_path / "run").modules.set_index(["step", "module"])
    of_tokens = ["full_grad_norm", "gradient_capture", "gradient_preconditioned_cosine"]
    for name in ("twice", "never"):
        assert modules.loc[(2, name), of_tokens].isna().all()
        assert np.isnan(modules.loc[(2, name), "data_weighted_spectrum"]).all()
        assert np.isnan(modules.loc[(2, name), "data_weighted_effective_rank"])
    assert modules.loc[(2, "once"), of_tokens].notna().all()
    assert np.isfinite(modules.loc[(2, "once"), "data_weighted_spectrum"]).all()
    assert modules.loc[(2, "twice"), "preconditioner_rank"] > 0


@pytest.mark.parametrize("whole", [True, False], ids=["adapters in bf16", "adapters in float32"])
def test_a_model_in_bf16(tmp_path: Path, whole: bool) -> None:
    """Everything is read of the numbers as they are; the twin's own gradient is rounded to 8 bits."""
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=1).to(torch.bfloat16)
    config = method_config("linchain-3-4", TARGETS)
    model = get_peft_model(base, config, autocast_adapter_dtype=not whole)
    assert {p.dtype for p in trained(model)} == {torch.bfloat16 if whole else torch.float32}
    optimizer = adamw(model)
    twins: list[dict[str, Dense]] = []
    run = train(
        tmp_path / "run",
        model,
        optimizer,
        3,
        before=lambda step: twins.append(look(model, small_models.batch("llama", seed=step))),
        preset="full",
        sample_every=1,
    )
    for step, twin in enumerate(twins, start=1):
        for name, dense in twin.items():
            recorded = row(run.modules, step, name)
            # 2^-9 in each entry, and backward passes of bf16 models round on the way.
            assert recorded["full_grad_norm"] == pytest.approx(np.linalg.norm(dense.gradient), rel=1e-2)
            assert recorded["gradient_capture"] == pytest.approx(captured(dense), rel=2e-2)
    for chain in find_chains(model):
        sigma = row(run.modules, 3, chain.module)["spectrum"]
        expected = np.linalg.svd(chain.scale * product(factor_views(chain)), compute_uv=False)[: len(sigma)]
        np.testing.assert_allclose(sigma, expected, rtol=0, atol=1e-6 * expected[0])


def test_several_adapters_on_a_layer_see_the_same_gradient(tmp_path: Path) -> None:
    model = adapted("linchain-3-4", b=0.3)
    model.add_adapter("second", method_config("linchain-0-2", TARGETS))
    model.base_model.set_adapter(["default", "second"])
    run = train(tmp_path / "run", model, adamw(model), 2, preset="full", sample_every=1)
    size = run.modules.set_index(["step", "module"])["full_grad_norm"]
    for name in {module.partition("@")[0] for _, module in size.index}:
        assert size[(2, f"{name}@default")] == pytest.approx(size[(2, f"{name}@second")], rel=1e-6)


def test_under_autocast_tokens_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    model = adapted(b=0.3)
    optimizer = sgd(model, 0.0)
    batch = small_models.batch("llama")
    dense = look(model, batch)
    with Tracker(model, optimizer, tmp_path / "run", preset="full", strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    modules = load_run(tmp_path / "run").modules
    for name, of_layer in dense.items():
        recorded = row(modules, 1, name)
        # Against the float32 twin: what autocast itself changes, 2^-8 and more.
        assert recorded["full_grad_norm"] == pytest.approx(np.linalg.norm(of_layer.gradient), rel=3e-2)
        assert recorded["gradient_capture"] == pytest.approx(captured(of_layer), rel=3e-2)


def test_snapshots_that_nobody_counted_thin_out_under_their_budget() -> None:
    measuring = Measuring(select("full"), [], snapshot_budget=1000)
    fits = [measuring._fits(100) for _ in range(20)]
    assert fits == [True] * 10 + [False] * 10
    assert measuring._num_thinnings >= 3
    asked = Measuring(select("full"), [], snapshot_every=5, snapshot_budget=10)
    assert all(asked._fits(100) for _ in range(20))


def test_measures_stand_in_for_a_preset_or_beside_it() -> None:
    assert select().name == "standard"
    alone, beside = select(None, ["orders"]), select("standard", ["orders"])
    assert (alone.spectra, [measure.name for measure in alone.measures]) == (False, ["orders"])
    assert (beside.spectra, beside.cosines, [measure.name for measure in beside.measures]) == (True, True, ["orders"])
    assert len(select("full", ["orders"]).measures) == len(select("full").measures)
    for name in ("participation_ratio", "delta_update_stable_rank"):  # computed from spectra, of delta or of its update
        assert select(None, [name]).spectra


def one_layer(frozen: str = "") -> tuple[nn.Module, Any, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(30, 20, bias=False)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    for name, parameter in model.named_parameters():
        if frozen and f"lora_{frozen}" in name:
            parameter.requires_grad_(False)
    return model, layer, [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("frozen", ["", "A", "B"])
@pytest.mark.parametrize("how", ["no gradient", "not in the optimiser"])
def test_a_factor_that_does_not_train_is_no_direction_of_the_chain(frozen: str, how: str, tmp_path: Path) -> None:
    model, layer, trained = one_layer(frozen if how == "no gradient" else "")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    if how != "no gradient" and frozen:
        held = getattr(layer, f"lora_{frozen}")["default"].weight
        trained = [parameter for parameter in trained if parameter is not held]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with Tracker(model, optimizer, tmp_path / "run", preset="full", strict=True, quiet=True):
        x = torch.randn(16, 30)
        output = model(x)
        output.retain_grad()
        a, b = (getattr(layer, f"lora_{n}")["default"].weight.detach().double().T.clone() for n in "AB")
        (output - torch.sin(x[:, :20])).pow(2).mean().backward()
        gradient = x.double().T @ output.grad.double()
        optimizer.step()
    u, v = torch.linalg.qr(a).Q, torch.linalg.qr(b.T).Q
    in_columns, in_rows = u @ (u.T @ gradient), (gradient @ v) @ v.T
    both = in_columns + in_rows - u @ (u.T @ in_rows)
    expected = {"": both, "A": in_columns, "B": in_rows}[frozen].norm() / gradient.norm()
    found = load_run(tmp_path / "run").modules.iloc[0]
    assert found["gradient_capture"] == pytest.approx(float(expected), rel=1e-5)
    assert found["preconditioner_rank"] == {"": 4 * (30 + 20 - 4), "A": 4 * 20, "B": 4 * 30}[frozen]
    assert found["preconditioned_share"] == pytest.approx(1.0, abs=0.02)  # one step of gradient descent, small enough


def test_delta_starts_before_any_of_several_optimisers_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"])
    )
    layers = model.base_model.model
    first, second = (torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1) for layer in layers)
    with (
        Tracker(model, first, tmp_path / "first", strict=True, quiet=True),
        Tracker(model, second, tmp_path / "second", strict=True, quiet=True),
    ):
        for _ in range(2):
            model(torch.randn(4, 8)).pow(2).sum().backward()
            first.step()
            second.step()
            first.zero_grad()
            second.zero_grad()
    found = load_run(tmp_path / "second").modules.query("module == '0' and step == 2")["delta_norm"].item()
    assert found == pytest.approx(float(layers[0].get_delta_weight("default").norm()), rel=1e-5)


def test_a_broken_factor_costs_no_other_module_its_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"])
    )
    layers = model.base_model.model
    with torch.no_grad():
        layers[1].lora_A["default"].weight[0, 0] = torch.nan
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with Tracker(model, optimizer, tmp_path / "run", preset="full", sample_every=1, strict=True, quiet=True):
        for _ in range(2):
            x = torch.randn(4, 8)
            (layers[0](x).sum() + layers[1](x).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    norms = load_run(tmp_path / "run").modules.pivot(index="step", columns="module", values="full_grad_norm")
    assert np.isfinite(norms["0"]).all()
    assert norms["1"].isna().all()
