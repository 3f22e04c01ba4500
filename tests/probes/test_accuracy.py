"""How exact spectra, ranks and norms are, against a dense float64 SVD of the product of the same float32 parameters.

The parameters are float32 numbers and are taken as they stand: the reference multiplies them out in float64, subtracts
where a change is asked for, and decomposes the whole (d_in, d_out) matrix. So nothing but the reading is tested.

Bounds:
    spectrum of delta           1e-6 σ₁. What is lost is at most the square root of the rounding of a float64 Gram
                                matrix of columns of length 1, √(64 ε c) ≈ 1e-6 for c = 64 dependent columns.
    effective rank of delta     1e-5
    update, norm and rank       1e-4 relative, for steps down to 1e-5 of the factor: float32 resolves those to 0.6 %,
                                which the reference sees as well, and float64 products cancel to 1e-16 / 1e-5.

The worst case of each is printed (`pytest -s`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import get_peft_model
from torch import Tensor, nn

from linchain_analysis import method_config
from linchain_analysis.measures.spectral import effective_rank
from linchain_analysis.probes import Chain, ChainReader, Reading, Wanted, find_chains

Array = NDArray[np.float64]
Move = Callable[[list[Tensor], torch.Generator], None]

SPECTRUM_BOUND = 1e-6  # of σ₁
RANK_BOUND = 1e-5
UPDATE_BOUND = 1e-4  # relative

STANDARD, FULL = Wanted(), Wanted(cores=True, gradients=True)


@dataclass
class Worst:
    """The largest error of each kind and where it was."""

    found: dict[str, tuple[float, str]] = field(default_factory=dict)

    def note(self, kind: str, error: float, place: str) -> float:
        if not error <= self.found.get(kind, (-1.0, ""))[0]:
            self.found[kind] = (error, place)
        return error


@pytest.fixture(scope="module")
def worst() -> Iterator[Worst]:
    found = Worst()
    yield found
    for kind, (error, place) in sorted(found.found.items()):
        print(f"\nworst {kind}: {error:.1e} ({place})", end="")
    print()


# --- chains and their dense twins ------------------------------------------------------------------------------------


def adapted(method: str, d_in: int, d_out: int, *, b: float = 0.02, seed: int = 0) -> Chain:
    """A linear layer adapted by `method`, B drawn at a size that training gives it."""
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out, bias=False)), method_config(method, ["0"]))
    (chain,) = find_chains(model)
    assert chain.refused is None
    with torch.no_grad():
        chain.factors[-1].parameter.normal_(std=b)
    return chain


def views(chain: Chain) -> list[Tensor]:
    """The factors in chain view, which write through to the parameters."""
    stored = [(factor, factor.matrix(factor.parameter.detach())) for factor in chain.factors]
    return [matrix.mT if factor.transposed else matrix for factor, matrix in stored]


def dense(chain: Chain) -> Array:
    """s · A W1 … Wn B of the float32 parameters, multiplied out in float64."""
    first, *others = [view.double() for view in views(chain)]
    for factor in others:
        first = first @ factor
    return chain.scale * first.numpy()


def step(reader: ChainReader, chain: Chain, move: Move, seed: int = 0) -> Reading:
    """Read one step in which `move` changes the factors."""
    reader.read_gradients()
    reader.read_before()
    with torch.no_grad():
        move(views(chain), torch.Generator().manual_seed(seed))
    reading, _ = reader.read_after()
    return reading


def singular_values(matrix: Array) -> Array:
    return np.linalg.svd(matrix, compute_uv=False)


def check_spectrum(worst: Worst, kind: str, measured: Array | None, matrix: Array, place: str) -> None:
    """Compare a spectrum and its effective rank with those of a dense matrix."""
    assert measured is not None
    expected = singular_values(matrix)
    padded = np.zeros_like(expected)
    padded[: len(measured)] = measured
    error = worst.note(f"σ of {kind} / σ₁", float(np.abs(padded - expected).max() / expected[0]), place)
    # What a spectrum leaves out is zero by the narrowest width; the reference has rounding there, 1e-16 σ₁ each.
    true = expected[: len(measured)]
    rank = worst.note(f"effective rank of {kind}", float(abs(effective_rank(measured) - effective_rank(true))), place)
    assert error <= SPECTRUM_BOUND, place
    assert rank <= RANK_BOUND, place


def check_update(worst: Worst, kind: str, reading: Reading, change: Array, place: str) -> None:
    """Compare norm and effective rank of an update of delta with those of a dense matrix."""
    measured = reading.delta_update_spectrum[0]
    assert measured is not None
    expected = singular_values(change)[: len(measured)]
    size = float(np.sqrt((change**2).sum()))
    norm = worst.note(f"norm of {kind}", float(abs(reading.delta_update_norm[0] - size) / size), place)
    true_rank = float(effective_rank(expected))
    rank = worst.note(f"effective rank of {kind}", float(abs(effective_rank(measured) - true_rank)) / true_rank, place)
    assert norm <= UPDATE_BOUND, place
    assert rank <= UPDATE_BOUND, place


# --- settings --------------------------------------------------------------------------------------------------------

SIZES = [(512, 384), (64, 1024), (12, 9)]  # the last is smaller than most ranks


def chain_name(n: int, rank: int, width: int | None, init: str) -> str:
    if n == 0:
        return f"linchain-0-{rank}"
    inner = f"-w{width}" if width and n > 1 else ""
    return f"linchain-{n}-{rank}{inner}-{init}"


def every_chain() -> list[object]:
    """n = 0 … 8 by widths, initialisation and size; most of the large ones are slow."""
    found = []
    for n in range(9):
        for rank, width in [(4, None), (16, None), (64, None), (8, 16)]:
            for d_in, d_out in SIZES:
                for init in ("kaiming", "orthogonal"):
                    if (n == 0 and init != "kaiming") or (n < 2 and width):  # without inner factors or inner widths
                        continue
                    name = chain_name(n, rank, width, init)
                    marks = pytest.mark.slow if d_in == 512 and n not in (0, 3, 8) else ()
                    found.append(pytest.param(name, d_in, d_out, marks=marks, id=f"{name}, {d_in} x {d_out}"))
    return found


def move_all(size: float) -> Move:
    """Every factor by a random step of `size` of its norm."""

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        for factor in factors:
            direction = torch.randn(factor.shape, generator=generator)
            factor += direction * (size * factor.norm() / direction.norm())

    return move


@pytest.mark.parametrize(("method", "d_in", "d_out"), every_chain())
def test_delta_and_updates_of_every_size(worst: Worst, method: str, d_in: int, d_out: int) -> None:
    chain = adapted(method, d_in, d_out)
    reader = ChainReader([chain])
    before = dense(chain)
    for exponent in range(-5, 0):
        place = f"{method}, {d_in} x {d_out}, step 1e{exponent}"
        reading = step(reader, chain, move_all(10.0**exponent), seed=-exponent)
        after = dense(chain)
        check_update(worst, "update", reading, after - before, place)
        if exponent in (-5, -1):
            check_spectrum(worst, "delta", reading.delta_spectrum[0], after, place)
        before = after


# --- steps that are special ------------------------------------------------------------------------------------------


def random_like(factor: Tensor, generator: torch.Generator, size: float) -> Tensor:
    direction = torch.randn(factor.shape, generator=generator)
    return direction * (size * factor.norm() / direction.norm())


def only(index: int, size: float = 1e-3) -> Move:
    """One factor moves and no other."""

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        factors[index] += random_like(factors[index], generator, size)

    return move


def all_but(index: int, size: float = 1e-3) -> Move:
    """One factor does not move, as A in LoRA-FA."""

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        for i, factor in enumerate(factors):
            if i != index % len(factors):
                factor += random_like(factor, generator, size)

    return move


def decay(size: float) -> Move:
    """Weight decay alone: every update lies along its factor, but for the rounding of float32."""

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        for factor in factors:
            factor *= 1 - size

    return move


def nearly_inside(outside: float, size: float = 1e-2) -> Move:
    """dA = A M + outside · noise, and dB alike: nearly in what the outer factors span already."""

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        first, last = factors[0], factors[-1]
        inside = first @ torch.randn(first.shape[1], first.shape[1], generator=generator)
        first += inside * (size * first.norm() / inside.norm()) + random_like(first, generator, size * outside)
        inside = torch.randn(last.shape[0], last.shape[0], generator=generator) @ last
        last += inside * (size * last.norm() / inside.norm()) + random_like(last, generator, size * outside)

    return move


def collapse_last(factors: list[Tensor], generator: torch.Generator) -> None:
    """B becomes a matrix of rank one, as after a first step of gradient descent on one example."""
    last = factors[-1]
    left, right = torch.randn(len(last), 1, generator=generator), torch.randn(1, last.shape[1], generator=generator)
    last.copy_(left @ right * 0.01)


def spread_last(factors: list[Tensor], generator: torch.Generator) -> None:
    """B gets singular values over five orders of magnitude."""
    last = factors[-1]
    u, _, vt = torch.linalg.svd(last.double(), full_matrices=False)
    last.copy_(u * torch.logspace(0, -5, u.shape[1], dtype=torch.float64) @ vt)


SPECIAL: dict[str, Move] = {
    "only B moves": only(-1),
    "only A moves": only(0),
    "only the second factor moves": only(1),
    "A is frozen": all_but(0),
    "B is frozen": all_but(-1),
    "the second factor is frozen": all_but(1),
    "weight decay 1e-1": decay(1e-1),
    "weight decay 1e-3": decay(1e-3),
    "weight decay 1e-5": decay(1e-5),
    **{f"dA in the span of A but for 1e{e}": nearly_inside(10.0**e) for e in (-1, -3, -5, -7)},
    "B becomes rank one": collapse_last,
    "B becomes badly conditioned": spread_last,
}
CHAINS = [("linchain-0-16", 64, 96), ("linchain-3-16-kaiming", 96, 64), ("linchain-8-64-orthogonal", 64, 128)]
CHAINS += [("linchain-2-8", 64, 48), ("linchain-3-16-kaiming", 12, 9)]
every_special = pytest.mark.parametrize("name", SPECIAL)
some_chains = pytest.mark.parametrize(("method", "d_in", "d_out"), CHAINS)


@some_chains
@every_special
@pytest.mark.parametrize("wanted", [STANDARD, FULL], ids=["standard", "full"])
def test_special_steps(worst: Worst, name: str, method: str, d_in: int, d_out: int, wanted: Wanted) -> None:
    chain = adapted(method, d_in, d_out)
    for i, factor in enumerate(chain.factors):
        factor.parameter.grad = torch.randn(factor.parameter.shape, generator=torch.Generator().manual_seed(i))
    place = f"{name}, {method}, {d_in} x {d_out}"
    before = dense(chain)
    reading = step(ChainReader([chain], wanted), chain, SPECIAL[name])
    after = dense(chain)
    check_spectrum(worst, "delta, special steps", reading.delta_spectrum[0], after, place)
    check_update(worst, "update, special steps", reading, after - before, place)


@some_chains
@pytest.mark.parametrize("wanted", [STANDARD, FULL], ids=["standard", "full"])
def test_the_first_step_from_zero(worst: Worst, method: str, d_in: int, d_out: int, wanted: Wanted) -> None:
    """Delta and its update are one matrix, and before the step there was none."""
    chain = adapted(method, d_in, d_out, b=0.0)
    reader = ChainReader([chain], wanted)
    assert not reader.keep_start().factors

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        factors[-1] += torch.randn(factors[-1].shape, generator=generator) * 1e-3

    reading = step(reader, chain, move)
    place = f"first step, {method}, {d_in} x {d_out}"
    check_spectrum(worst, "delta, first step", reading.delta_spectrum[0], dense(chain), place)
    check_update(worst, "update, first step", reading, dense(chain), place)


@some_chains
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_gradient_descent_whose_updates_are_multiples_of_the_gradients(
    worst: Worst, method: str, d_in: int, d_out: int, size: float
) -> None:
    """Preset `full` puts gradients beside updates, and here these columns depend on each other to rounding."""
    chain = adapted(method, d_in, d_out)
    generator = torch.Generator().manual_seed(3)
    for factor in chain.factors:
        gradient = torch.randn(factor.parameter.shape, generator=generator)
        factor.parameter.grad = gradient * (size * factor.parameter.detach().norm() / gradient.norm())

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        for factor in chain.factors:
            factor.parameter.sub_(factor.parameter.grad)

    before = dense(chain)
    reading = step(ChainReader([chain], FULL), chain, move)
    place = f"gradient descent by {size:g}, {method}, {d_in} x {d_out}"
    check_spectrum(worst, "delta, gradient descent", reading.delta_spectrum[0], dense(chain), place)
    check_update(worst, "update, gradient descent", reading, dense(chain) - before, place)


@some_chains
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_a_step_along_the_gauge_keeps_its_digits(worst: Worst, method: str, d_in: int, d_out: int, size: float) -> None:
    """A → A (1 + M), B → (1 − M) B or a neighbour's: the first orders cancel, and `size` squared is left of delta.

    In float64 the terms that cancel are known to 1e-16 / pivot, the pivot of the updates' columns beside the factors'
    being the rounding of float32 in them, 6e-8 / size; against size², that leaves 1e-16 · size / 6e-8 / size² ≪ 1e-4.
    """
    chain = adapted(method, d_in, d_out)

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        width = factors[0].shape[1]
        mixing = torch.randn(width, width, generator=generator) * (size / width**0.5)
        factors[0] += factors[0] @ mixing
        factors[1] -= mixing @ factors[1]

    before = dense(chain)
    reading = step(ChainReader([chain]), chain, move)
    change = dense(chain) - before
    assert np.linalg.norm(change) < 3 * size * size * np.linalg.norm(before) * (1 + d_in / 9)
    check_update(worst, "update along the gauge", reading, change, f"{size:g}, {method}, {d_in} x {d_out}")


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("method", ["linchain-0-16", "linchain-3-16-orthogonal"])
def test_a_product_that_is_small_beside_its_factors(worst: Worst, method: str, ratio: float) -> None:
    """A has one large direction, which the next factor does not let through: all of delta is `ratio` of that.

    Here B is of lower rank up to the rounding of float32, and what is read of that rounding is not exact: the bound
    holds beside the product of the factors' norms, and beside σ₁ only where the product is not much smaller.
    """
    chain = adapted(method, 96, 64)
    generator = torch.Generator().manual_seed(1)
    first, second = views(chain)[:2]
    with torch.no_grad():
        direction = torch.randn(first.shape[1], 1, generator=generator)
        direction /= direction.norm()
        first.mul_(ratio).add_(torch.randn(len(first), 1, generator=generator) @ direction.mT)
        second.sub_(direction @ (direction.mT @ second))
    reading = step(ChainReader([chain]), chain, lambda factors, generator: None)
    expected = singular_values(dense(chain))
    sigma = reading.delta_spectrum[0]
    assert sigma is not None
    norms = chain.scale * np.prod([np.linalg.norm(view.numpy(), 2) for view in views(chain)])
    assert expected[0] < 0.5 * norms
    error = float(np.abs(sigma - expected[: len(sigma)]).max() / norms)
    assert worst.note("σ of a product that cancels, of the norms", error, f"{method}, {ratio:g}") <= SPECTRUM_BOUND


# --- delta as a difference of products that are not zero -------------------------------------------------------------


@some_chains
@pytest.mark.parametrize("wanted", [STANDARD, FULL], ids=["standard", "full"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_delta_since_a_start_that_is_not_zero(
    worst: Worst, method: str, d_in: int, d_out: int, wanted: Wanted, size: float
) -> None:
    """What moved is a small part of the product, and its spectrum is exact all the same."""
    chain = adapted(method, d_in, d_out)
    for i, factor in enumerate(chain.factors):
        factor.parameter.grad = torch.randn(factor.parameter.shape, generator=torch.Generator().manual_seed(i))
    reader = ChainReader([chain], wanted)
    assert len(reader.keep_start().factors) == len(chain.factors)
    start = before = dense(chain)
    for seed in range(3):
        reading = step(reader, chain, move_all(size), seed)
        after = dense(chain)
        place = f"step {seed + 1} of {size:g}, {method}, {d_in} x {d_out}"
        check_spectrum(worst, "delta since a start", reading.delta_spectrum[0], after - start, place)
        check_update(worst, "update since a start", reading, after - before, place)
        before = after


# --- norms alone -----------------------------------------------------------------------------------------------------


@some_chains
@every_special
def test_norms_of_the_preset_light(worst: Worst, name: str, method: str, d_in: int, d_out: int) -> None:
    chain = adapted(method, d_in, d_out)
    before = dense(chain)
    reading = step(ChainReader([chain], Wanted(cosines=False, spectra=False)), chain, SPECIAL[name])
    after = dense(chain)
    place = f"{name}, {method}, {d_in} x {d_out}"
    for kind, measured, matrix in (
        ("norm of delta, light", reading.delta_norm[0], after),
        ("norm of update, light", reading.delta_update_norm[0], after - before),
    ):
        size = float(np.sqrt((matrix**2).sum()))
        # Products of columns of length 1 in float32 are exact to 1e-7; a norm is the root of a sum of them.
        assert worst.note(kind, abs(measured - size) / size, place) <= UPDATE_BOUND, place


@some_chains
@pytest.mark.parametrize("size", [1e-1, 1e-3])
def test_norms_of_the_preset_light_where_terms_cancel(
    worst: Worst, method: str, d_in: int, d_out: int, size: float
) -> None:
    """Along the gauge `light` knows the norm of the update to 1e-3 of the terms that cancel, and no better.

    Its products are of float32 columns of length 1, whose rounding 1e-7 in a square is 3e-4 in a norm.
    """
    chain = adapted(method, d_in, d_out)
    terms = []

    def move(factors: list[Tensor], generator: torch.Generator) -> None:
        width = factors[0].shape[1]
        mixing = torch.randn(width, width, generator=generator) * (size / width**0.5)
        change = factors[0] @ mixing
        terms.append(float(torch.linalg.multi_dot([change, *factors[1:]]).double().norm()) * chain.scale)
        factors[0] += change
        factors[1] -= mixing @ factors[1]

    before = dense(chain)
    reading = step(ChainReader([chain], Wanted(cosines=False, spectra=False)), chain, move)
    error = abs(reading.delta_update_norm[0] - np.linalg.norm(dense(chain) - before)) / terms[0]
    worst.note("norm of update along the gauge, light, of the terms that cancel", error, f"{size:g}, {method}")
    assert error <= 1e-3
