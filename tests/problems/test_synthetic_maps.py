"""Linear maps to learn: their targets, their loss and gradient, the smallest loss, and settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from linchain_analysis.errors import InputError
from linchain_analysis.problems.synthetic import MAP_NAMES, LinearMaps, MapSetting
from linchain_analysis.problems.synthetic.streams import open_stream
from linchain_analysis.problems.synthetic.targets import rotation, shear

ALL = np.arange(2)
SETTINGS: dict[str, dict[str, Any]] = {
    "whitened": {},
    "noisy": {"label_noise": 0.5},
    "ill-conditioned": {"input_decay": 2.0},
    "ill-conditioned, noisy": {"input_decay": 2.0, "label_noise": 0.5},
    "few samples": {"num_samples": 5, "label_noise": 0.5},
    "many samples": {"num_samples": 20, "label_noise": 0.5, "input_decay": 1.0},
    "exact samples": {"num_samples": 20},
    "completion": {"observed": 0.4},
    "samples in part": {"num_samples": 20, "observed": 0.4, "label_noise": 0.5},
    "quartic": {"loss": "quartic"},
    "quartic, everything": {
        "loss": "quartic",
        "num_samples": 20,
        "observed": 0.7,
        "label_noise": 0.3,
        "input_decay": 1,
    },
}


def draw(**options: Any) -> LinearMaps:
    return MapSetting(**{"dim": 8, "dim_out": 6, "target_rank": 4, **options}).draw([0, 1])


def naive_loss(problem: LinearMaps, delta: np.ndarray, k: int) -> float:
    """The definition, entry by entry: labels first, then predictions, then the mean over the samples."""
    d_in, d_out = problem.shape
    covariance = problem.covariance if len(problem.covariance) else np.ones(d_in)
    inputs = np.diag(np.sqrt(covariance)) if problem.design is None else problem.design[k]
    labels = inputs @ problem.targets[k]
    if problem.noise is not None:
        labels = labels + problem.noise[k]
    total = 0.0
    for n in range(len(inputs)):
        for j in range(d_out):
            if problem.observed is None or problem.observed[k, n, j]:
                error = float(inputs[n] @ delta[:, j] - labels[n, j])
                total += error**2 / 2 if problem.power == 2 else error**4 / 4
    return total / (1 if problem.design is None else len(inputs))


def test_two_dimensional_targets_by_hand() -> None:
    half, root = 0.5, math.sqrt(3) / 2
    expected = {
        "rotation": [[half, root], [-root, half]],
        "shear": [[1, 0], [1, 1]],
        "shear-rotation": [[half, root], [half - root, half + root]],
        "rotation-shear": [[half + root, root], [half - root, half]],
    }
    for name, matrix in expected.items():
        target = MapSetting(name, dim=2, target_rank=2).draw([7]).targets[0]
        np.testing.assert_allclose(target, matrix, rtol=0, atol=1e-15, err_msg=name)
    # (x, y) = (1, 2) is moved by its height along the first axis; (1, 0) is turned counter-clockwise.
    np.testing.assert_allclose([1, 2] @ shear(1.0), [3, 2])
    np.testing.assert_allclose([1, 0] @ rotation(math.pi / 2), [0, 1], atol=1e-15)


def test_targets_of_one_seed_differ_in_what_their_name_says() -> None:
    targets = {name: MapSetting(name, dim=16, target_rank=6).draw([3]).targets[0] for name in MAP_NAMES[:4]}
    sigma = {name: np.linalg.svd(target, compute_uv=False) for name, target in targets.items()}
    np.testing.assert_allclose(sigma["rotation"], [1] * 6 + [0] * 10, atol=1e-14)
    np.testing.assert_allclose(sigma["shear-rotation"], sigma["shear"], atol=1e-14)
    np.testing.assert_allclose(sigma["rotation-shear"], sigma["shear"], atol=1e-14)
    # A rotation of the outputs alone: the Gram matrix over the inputs is the same, and that of rotation-shear is not.
    gram = targets["shear"] @ targets["shear"].T
    np.testing.assert_allclose(targets["shear-rotation"] @ targets["shear-rotation"].T, gram, atol=1e-14)
    assert np.abs(targets["rotation-shear"] @ targets["rotation-shear"].T - gram).max() > 0.1


@pytest.mark.parametrize("name", MAP_NAMES)
def test_a_target_is_the_same_whatever_it_is_learned_from(name: str) -> None:
    plain = MapSetting(name, dim=8).draw([1, 2])
    other = MapSetting(name, dim=8, num_samples=5, label_noise=1.0, observed=0.5, input_decay=1.0).draw([2])
    np.testing.assert_array_equal(plain.targets[1], other.targets[0])
    assert not np.array_equal(plain.targets[0], plain.targets[1])


@pytest.mark.parametrize(
    ("options", "sigma"),
    [
        ({"target_rank": 0}, [0, 0, 0]),
        ({"name": "spectrum", "spectrum": (0.0,)}, [0, 0, 0]),
        ({"name": "spectrum", "spectrum": ()}, [0, 0, 0]),
        ({"name": "spectrum", "spectrum": [1, 3]}, [3, 1, 0]),
        ({"name": "spectrum", "target_rank": 2}, [1, 1, 0]),
        ({"name": "rotation", "target_rank": 1}, [1, 0, 0]),
        ({"name": "rotation", "target_rank": 99}, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("shape", [(3, 3), (3, 7), (7, 3)])
def test_singular_values_of_targets(options: dict[str, Any], sigma: list[float], shape: tuple[int, int]) -> None:
    setting = MapSetting(**{"name": "shear", **options, "dim": shape[0], "dim_out": shape[1]})
    target = setting.draw([5]).targets[0]
    assert target.shape == shape
    np.testing.assert_allclose(np.linalg.svd(target, compute_uv=False), sigma, atol=1e-14)


def test_one_dimension_is_the_number_one() -> None:
    np.testing.assert_allclose(np.abs(MapSetting("shear", dim=1).draw([0]).targets), [[[1.0]]], rtol=1e-15)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_are_those_of_the_definition(options: dict[str, Any]) -> None:
    problem = draw(**options)
    index = np.array([1, 0, 0, 1])  # neither sorted nor one of each
    delta = np.random.default_rng(0).standard_normal((4, 8, 6))
    loss, gradient = problem.evaluate(delta.copy(), index)
    expected = [naive_loss(problem, delta[i], index[i]) for i in range(4)]
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    direction = np.random.default_rng(1).standard_normal(delta.shape)
    h = 1e-5  # a quartic's central difference is off by h² times its third derivative: 1e-10 times a few hundred
    ahead, behind = (problem.losses(delta + s * h * direction, index) for s in (1, -1))
    np.testing.assert_allclose((gradient * direction).sum(axis=(1, 2)), (ahead - behind) / (2 * h), rtol=1e-6)


def test_population_loss_is_the_mean_over_many_inputs() -> None:
    problem = draw(input_decay=1.0, num_samples=5, label_noise=3.0)
    delta = np.random.default_rng(0).standard_normal((2, 8, 6))
    inputs = np.random.default_rng(1).standard_normal((200_000, 8)) / np.sqrt(np.arange(1, 9))
    for k in range(2):
        errors = ((inputs @ (delta[k] - problem.targets[k])) ** 2).sum(axis=1) / 2
        spread = errors.std() / math.sqrt(len(errors))
        assert abs(problem.population_losses(delta, ALL)[k] - errors.mean()) < 5 * spread
    assert not problem.is_population
    for options in ({}, {"input_decay": 1.0}):
        problem = draw(**options)
        assert problem.is_population
        np.testing.assert_allclose(problem.evaluate(delta, ALL)[0], problem.population_losses(delta, ALL), rtol=1e-14)


@pytest.mark.parametrize("loss", ["quadratic", "quartic"])
def test_a_stream_has_the_mean_of_its_steps(loss: str) -> None:
    problem = draw(batch_size=20, label_noise=0.5, input_decay=1.0, loss=loss)
    delta = problem.targets + 0.3 * np.random.default_rng(0).standard_normal((2, 8, 6))
    steps = np.array([problem.at_step(step).evaluate(delta, ALL)[0] for step in range(1, 1001)])
    spread = steps.std(axis=0) / math.sqrt(len(steps))
    assert (np.abs(steps.mean(axis=0) - problem.losses(delta, ALL)) < 5 * spread).all()
    np.testing.assert_array_equal(problem.at_step(4).design, problem.at_step(4).design)
    assert not np.array_equal(problem.at_step(4).design, problem.at_step(5).design)
    np.testing.assert_array_equal(problem.take(np.array([1])).at_step(4).design[0], problem.at_step(4).design[1])
    with pytest.raises(InputError, match="a stream"):
        problem.evaluate(delta, ALL)


def smallest_by_search(problem: LinearMaps, k: int, rank: int) -> float:
    """The least loss over products of two factors that a quasi-Newton search from several starts finds."""
    d_in, d_out = problem.shape

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        left, right = flat[: d_in * rank].reshape(d_in, rank), flat[d_in * rank :].reshape(rank, d_out)
        loss, gradient = problem.evaluate((left @ right)[None], np.array([k]))
        parts = (gradient[0] @ right.T, left.T @ gradient[0])
        return float(loss[0]), np.concatenate([part.ravel() for part in parts])

    best = math.inf
    for seed in range(4):
        start = np.random.default_rng(seed).standard_normal((d_in + d_out) * rank)
        found = minimize(
            value,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 4000, "maxfun": 8000, "ftol": 1e-16, "gtol": 1e-11},
        )
        best = min(best, float(found.fun))
    return best


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_no_search_finds_less_than_the_smallest_loss(options: dict[str, Any], rank: int) -> None:
    problem = draw(**options)
    smallest = problem.smallest_losses(rank)[0]
    if math.isnan(smallest):  # another loss than the quadratic of all entries, and T is out of reach or not the best
        assert problem.power == 4 or problem.observed is not None
        assert rank < 4 or problem.noise is not None
        return
    found = smallest_by_search(problem, 0, rank)
    # A quartic is flat at its optimum: errors of 1e-4 are losses of 1e-16 there, and the search stops before these.
    assert smallest - 1e-12 <= found <= smallest + 1e-7


def test_smallest_losses_by_hand() -> None:
    setting = {"name": "spectrum", "dim": 4, "dim_out": 3, "spectrum": (3.0, 2.0, 1.0)}
    problem = MapSetting(**setting).draw([0])
    np.testing.assert_allclose([problem.smallest_losses(r)[0] for r in (0, 1, 2, 3)], [7, 2.5, 0.5, 0], rtol=1e-14)
    assert problem.smallest_losses(99)[0] == 0.0  # rounding is no loss
    stream = MapSetting(**setting, batch_size=2, label_noise=0.5).draw([0])
    np.testing.assert_allclose(stream.smallest_losses(2), 0.5 + 0.25 * 3 / 2, rtol=1e-14)
    quartic = MapSetting(**setting, batch_size=2, label_noise=0.5, loss="quartic").draw([0])
    np.testing.assert_allclose(quartic.smallest_losses(3), 3 * 0.5**4 / 4 * 3, rtol=1e-14)
    assert np.isnan(quartic.smallest_losses(2)[0])
    np.testing.assert_allclose(quartic.losses(quartic.targets, np.array([0])), quartic.smallest_losses(3), rtol=1e-14)
    few = MapSetting(**setting, num_samples=2, label_noise=0.5, loss="quartic").draw([0])
    assert few.smallest_losses(2)[0] == 0.0  # two noisy samples can be learned by heart
    assert np.isnan(few.smallest_losses(1)[0])


def test_zero_target_and_inputs_that_vanish() -> None:
    problem = MapSetting(dim=5, target_rank=0).draw([0])
    loss, gradient = problem.evaluate(np.zeros((1, 5, 5)), np.array([0]))
    assert loss[0] == 0.0 and not gradient.any() and problem.smallest_losses(1)[0] == 0.0
    assert problem.target_losses[0] == 0.0
    blind = LinearMaps(np.ones((1, 2, 2)), noise=np.array([[[3.0, 0], [0, 4]]]), covariance=np.array([1.0, 0.0]))
    # Labels (4, 1) of the first input, which is seen; the second is 0 and its labels (0, 4) are noise for ever.
    np.testing.assert_allclose([blind.smallest_losses(r)[0] for r in (0, 1)], [(17 + 16) / 2, 16 / 2])


@pytest.mark.parametrize(
    ("options", "place", "do"),
    [
        ({"name": "shear-rotaton"}, "problem", "did you mean 'shear-rotation'"),
        ({"loss": "quadratc"}, "loss", "did you mean 'quadratic'"),
        ({"dim": 0}, "dim", ""),
        ({"dim": 2.0}, "dim", ""),
        ({"dim": True}, "dim", ""),
        ({"dim_out": 0}, "dim_out", ""),
        ({"target_rank": -1}, "target_rank", ""),
        ({"num_samples": 0}, "num_samples", ""),
        ({"batch_size": 0}, "batch_size", ""),
        ({"batch_size": 2, "num_samples": 2}, "batch_size", "leave out one"),
        ({"batch_size": 2, "observed": 0.5}, "observed", "leave out"),
        ({"label_noise": -0.1}, "label_noise", ""),
        ({"label_noise": math.inf}, "label_noise", ""),
        ({"observed": 0.0}, "observed", ""),
        ({"observed": 1.1}, "observed", ""),
        ({"observed": math.nan}, "observed", ""),
        ({"input_decay": math.inf}, "input_decay", ""),
        ({"input_decay": -1.0}, "input_decay", ""),
        ({"spectrum": (1.0,)}, "spectrum", "leave it out"),
        ({"name": "spectrum", "spectrum": (1.0, -1.0)}, "spectrum", ""),
        ({"name": "spectrum", "spectrum": (math.nan,)}, "spectrum", ""),
        ({"name": "spectrum", "dim": 2, "spectrum": (1.0, 1.0, 1.0)}, "spectrum", "give fewer"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], place: str, do: str) -> None:
    with pytest.raises(InputError) as caught:
        MapSetting(**options)
    assert caught.value.place == place
    assert do in caught.value.do


@pytest.mark.parametrize("seeds", [[], [-1], [0.5]])
def test_seeds_that_are_refused(seeds: list[Any]) -> None:
    with pytest.raises(InputError, match="data_seeds"):
        MapSetting(dim=2).draw(seeds)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("design", {"design": np.ones((1, 4, 3))}),
        ("noise", {"noise": np.ones((2, 4, 2))}),
        ("observed", {"design": np.ones((2, 4, 3)), "observed": np.ones((2, 3, 2), bool)}),
        ("covariance", {"covariance": np.ones(2)}),
        ("power", {"power": 3}),
        ("batch_size", {"batch_size": 2, "seeds": (0, 1), "noise": np.ones((2, 3, 2))}),
        ("seeds", {"batch_size": 2}),
    ],
)
def test_arrays_that_do_not_belong_together(place: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        LinearMaps(np.ones((2, 3, 2)), **options)
    assert caught.value.place == place


def test_streams_of_seeds_parts_and_steps_are_apart() -> None:
    """NumPy makes one stream of [2³², 0] and [0, 1]; and a step must not repeat the samples of its seed."""
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (2**32 + 1, 0, 0), (2**64, 0, 0), (0, 4, 1), (0, 4, 2)]
    drawn = [open_stream(*key).standard_normal() for key in keys]
    assert len(set(drawn)) == len(keys)
    # A fixed part is what it was before steps had streams: published numbers stay.
    assert open_stream(3, 1).standard_normal() == np.random.default_rng([3, 1]).standard_normal()
