from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.errors import InputError
from linchain_analysis.measures.sharpness import TopEigenvalue, stability_edge, top_eigenvalue


def symmetric(seed: int, size: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    return matrix + matrix.T


def top_of(matrix: np.ndarray, **options: object) -> TopEigenvalue:
    return top_eigenvalue(lambda vector: matrix @ vector, len(matrix), **options)  # type: ignore[arg-type]


def test_values_computed_by_hand() -> None:
    hessian = np.array([[2.0, 1.0], [1.0, 2.0]])  # eigenvalues 3 and 1
    found = top_of(hessian, tolerance=0)
    assert found.value == pytest.approx(3, rel=1e-14)
    np.testing.assert_allclose(np.abs(found.vector), np.sqrt([0.5, 0.5]), rtol=1e-12)
    # D^-½ H D^-½ with D = diag(4, 1) is [[½, ½], [½, 2]]: λ = (5 + √13)/4
    assert top_of(hessian, preconditioner=[4.0, 1.0], tolerance=0).value == pytest.approx((5 + math.sqrt(13)) / 4)
    assert top_of(np.diag([1.0, -5.0])).value == pytest.approx(1)
    assert top_of(np.diag([1.0, -5.0]), which="LM").value == pytest.approx(-5)


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_it_is_the_dense_eigenvalue(seed: int, size: int) -> None:
    matrix = symmetric(seed, size)
    diagonal = np.random.default_rng(seed).uniform(0.1, 10, size)
    scaled = matrix / np.sqrt(diagonal) / np.sqrt(diagonal)[:, None]
    for dense, options in ((matrix, {}), (scaled, {"preconditioner": diagonal})):
        found = top_of(matrix, tolerance=0, **options)
        values = np.linalg.eigvalsh(dense)
        size_of_dense = np.abs(values).max()
        # 1e-12 of the matrix: rounding of products and of both iterations
        assert found.converged and found.value == pytest.approx(values[-1], abs=1e-12 * size_of_dense)
        assert found.residual <= 1e-11 * size_of_dense
        assert np.linalg.norm(dense @ found.vector - found.value * found.vector) == pytest.approx(
            found.residual, abs=1e-13 * size_of_dense
        )
        signed = top_of(matrix, tolerance=0, which="LM", **options)
        assert abs(signed.value) == pytest.approx(size_of_dense, rel=1e-12)


@given(st.integers(0, 2**32))
def test_it_does_not_depend_on_the_coordinates(seed: int) -> None:
    matrix = symmetric(seed, 12)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 12)))[0]
    turned = top_of(rotation @ matrix @ rotation.T, tolerance=0).value
    assert turned == pytest.approx(top_of(matrix, tolerance=0).value, abs=1e-12 * np.linalg.norm(matrix))
    # Parameters measured in other units, D along with them: the preconditioned sharpness stays.
    units = np.random.default_rng(seed).uniform(0.5, 2, 12)
    rescaled = top_of(matrix * units * units[:, None], preconditioner=units**2, tolerance=0).value
    assert rescaled == pytest.approx(top_of(matrix, tolerance=0).value, abs=1e-12 * np.linalg.norm(matrix))


def test_tolerance_bounds_the_error_and_saves_products() -> None:
    matrix = symmetric(0, 400)
    exact = np.linalg.eigvalsh(matrix)[-1]
    rough, fine = top_of(matrix, tolerance=1e-2), top_of(matrix, tolerance=1e-10)
    assert abs(rough.value - exact) <= rough.residual <= 1e-2 * exact
    assert abs(fine.value - exact) <= 1e-10 * exact
    assert rough.num_products < fine.num_products < 400


def test_products_are_counted_and_the_result_is_reproducible() -> None:
    matrix = symmetric(1, 50).astype(np.float32)
    calls = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return matrix @ vector.astype(np.float32)

    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = top_eigenvalue(product, 50)
    assert found.num_products == calls
    assert found.value == pytest.approx(np.linalg.eigvalsh(matrix.astype(float))[-1], rel=1e-4)
    again = top_eigenvalue(product, 50)
    assert found.value == again.value
    np.testing.assert_array_equal(found.vector, again.vector)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("which", ["LA", "LM"])
@pytest.mark.parametrize("value", [2.0, -2.0])
def test_degenerate_hessians(which: str, value: float) -> None:
    assert top_of(np.array([[value]]), which=which).value == pytest.approx(value)
    assert top_of(value * np.eye(30), which=which).value == pytest.approx(value)
    ones = np.full((5, 5), value / 5)  # rank 1, eigenvalues `value` and 0
    expected = value if which == "LM" else max(value, 0)
    assert top_of(ones, which=which).value == pytest.approx(expected, abs=1e-12)
    again = [top_of(ones, which=which).vector for _ in range(2)]
    np.testing.assert_array_equal(*again)  # also where Lanczos ends early and goes on from a new random vector
    zero = top_of(np.zeros((4, 4)), which=which)
    assert (zero.value, zero.residual, zero.num_products) == (0, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_products_that_are_not_finite_give_nan(bad: float) -> None:
    found = top_eigenvalue(lambda vector: np.full(4, bad), 4)
    assert math.isnan(found.value) and math.isnan(found.residual) and not found.converged
    assert np.isnan(found.vector).all()


def test_no_number_where_the_iteration_did_not_converge() -> None:
    found = top_of(symmetric(2, 500), tolerance=0, max_restarts=1)
    assert math.isnan(found.value) and not found.converged
    assert found.num_products > 10


def test_edges_by_hand() -> None:
    assert stability_edge("gradient_descent", 0.1) == pytest.approx(20)
    assert stability_edge("heavy_ball", 0.1, 0.9) == pytest.approx(38)
    assert stability_edge("adam", 1e-3, 0.9) == pytest.approx(38 / 1e-3)
    assert stability_edge("adam", 1.0, 0.0) == stability_edge("gradient_descent", 1.0) == 2
    assert stability_edge("adam", 0.0) == math.inf


@given(st.floats(1e-3, 1), st.floats(0, 0.95), st.sampled_from(["gradient_descent", "heavy_ball", "adam"]))
def test_iterations_on_a_parabola_diverge_beyond_the_edge_only(rate: float, beta: float, kind: str) -> None:
    """The independent twin: spectral radius of the update of (x, m) on ½ λ x²."""
    edge = stability_edge(kind, rate, beta)  # type: ignore[arg-type]

    def radius(sharpness: float) -> float:
        if kind == "gradient_descent":
            return abs(1 - rate * sharpness)
        gain = 1 - beta if kind == "adam" else 1.0
        momentum = np.array([gain * sharpness, beta])  # m' = β m + gain λ x; x' = x − η m'
        return float(np.abs(np.linalg.eigvals([[1 - rate * momentum[0], -rate * beta], momentum])).max())

    # 1e-3 of the edge moves the radius by far more than the 1e-9 that is asked for.
    assert radius(edge * 0.999) < 1 - 1e-9
    assert radius(edge * 1.001) > 1 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": [1.0, 0.0, 1.0]}, "preconditioner.*smallest 0"),
        ({"preconditioner": [1.0]}, r"preconditioner.*\(3,\).*\(1,\)"),
        ({"which": "SA"}, "which.*'SA'"),
        ({"tolerance": -1.0}, "tolerance.*-1"),
        ({"num_basis_vectors": 1}, "num_basis_vectors.*got 1"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        top_of(np.eye(3), **options)


def test_wrong_products_and_edges_are_refused() -> None:
    with pytest.raises(InputError, match=r"hessian_vector_product.*\(3,\).*\(2,\)"):
        top_eigenvalue(lambda vector: vector[:2], 3)
    with pytest.raises(InputError, match="dimension"):
        top_eigenvalue(lambda vector: vector, 0)
    with pytest.raises(InputError, match=r"optimizer.*'sgd'"):
        stability_edge("sgd", 0.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"learning_rate.*nan"):
        stability_edge("adam", math.nan)
    with pytest.raises(InputError, match=r"beta1.*1"):
        stability_edge("adam", 0.1, 1.0)
