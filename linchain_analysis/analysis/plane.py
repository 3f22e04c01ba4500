"""The plane of shear and rotation: where a 2 × 2 map lies in it, and how small the loss can be at each point.

With row vectors, S(k) = [[1, 0], [k, 1]] shears and R(θ) = [[cos θ, sin θ], [−sin θ, cos θ]] rotates. Every 2 × 2
matrix whose first row is not zero is, in one way,

    M = S(k) D R(θ),   D = diag(a, b), a > 0:

a Gram–Schmidt of its rows. θ is the direction of the first row and a its length, k is how much of the first row the
second holds, and b what remains of the second, negative where M reflects. D stands in the middle, and not at either
end, because k then stays finite where M is singular (b = 0), as ΔW nearly is as long as one direction has been learned.
S(k) R(θ), sheared first and then rotated, has D = I.

In the other order, M = R(θ) D S(k) with b > 0, a the signed one; that is the same decomposition of J Mᵀ J, with J the
exchange of the two coordinates, for which J S(k)ᵀ J = S(k) and J R(θ)ᵀ J = R(θ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from linchain_analysis.errors import InputError
from linchain_analysis.measures.cores import norm, ratio

Floats = NDArray[np.float64]
Order = Literal["shear-rotation", "rotation-shear"]
COORDINATES = ["angle", "shear", "first_scale", "second_scale"]


@dataclass(frozen=True)
class PlaneCoordinates:
    """Where matrices lie; every array has the shape of the stack.

    Attributes:
        angle: θ in radians, in (−π, π].
        shear: k.
        first_scale: a, or b in the order `rotation-shear`: above 0.
        second_scale: The other; 0 for a singular matrix, negative for one that reflects.
    """

    angle: Floats
    shear: Floats
    first_scale: Floats
    second_scale: Floats


def locate(matrices: ArrayLike, order: Order = "shear-rotation") -> PlaneCoordinates:
    """Return the coordinates of each matrix.

    Args:
        matrices: (…, 2, 2).
        order: Which comes first, as `x M` is read from left to right.

    Returns:
        NaN where they are undefined: in the zero matrix, in one whose first row (last column in the other order) is
        at rounding level of the whole, which has no direction, and where an entry is not finite.

    Raises:
        InputError: Matrices of another size, or an unknown order.
    """
    rows = _reflect(_require_square(matrices), order)
    first, second = rows[..., 0, :], rows[..., 1, :]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Exponents are taken out first, so that no square over- or underflows.
        size = np.abs(rows).max(axis=(-2, -1))
        first, second = first / size[..., None], second / size[..., None]
        square = (first * first).sum(axis=-1)
        length = np.sqrt(square)
        angle = np.arctan2(first[..., 1], first[..., 0])
        found = (
            np.where(angle == -np.pi, np.pi, angle),  # of (−1, −0.0), and of what rounds to it
            (first * second).sum(axis=-1) / square,
            size * length,
            size * ((first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]) / length),
        )
        known = np.isfinite(rows).all(axis=(-2, -1)) & (length > 4 * np.finfo(np.float64).eps)
    return PlaneCoordinates(*(np.where(known, values, np.nan) for values in found))


def compose(coordinates: PlaneCoordinates, order: Order = "shear-rotation") -> Floats:
    """Return the matrices (…, 2, 2) of coordinates: what `locate` takes apart."""
    cos, sin = np.cos(coordinates.angle), np.sin(coordinates.angle)
    a, b, k = coordinates.first_scale, coordinates.second_scale, coordinates.shear
    first = np.stack([a * cos, a * sin], axis=-1)
    second = k[..., None] * first + np.stack([-b * sin, b * cos], axis=-1)
    return _reflect(np.stack([first, second], axis=-2), order)


def smallest_losses(target: ArrayLike, angle: ArrayLike, shear: ArrayLike, order: Order = "shear-rotation") -> Floats:
    """Return the smallest ½‖M − T‖² over all M at given points of the plane, that is over both scales.

    With C = T R(θ)ᵀ, M − T has the norm of S(k) D − C = [[a − c₀₀, −c₀₁], [k a − c₁₀, b − c₁₁]]. So b = c₁₁, and
    a = max(0, c₀₀ + k c₁₀) / (1 + k²) (where that is 0 it is an infimum). NaN where k is not finite.

    Args:
        target: T, (2, 2).
        angle: θ in radians.
        shear: k; both are broadcast.
        order: As `locate` takes it.
    """
    angle, k = np.broadcast_arrays(np.asarray(angle, dtype=np.float64), np.asarray(shear, dtype=np.float64))
    rows = _reflect(_require_square(target), order)
    cos, sin = np.cos(angle), np.sin(angle)
    c00, c10 = (rows[i, 0] * cos + rows[i, 1] * sin for i in (0, 1))
    c01 = rows[0, 1] * cos - rows[0, 0] * sin
    with np.errstate(invalid="ignore"):
        length = np.hypot(1.0, k)  # k² itself overflows from 1e154 on
        a = np.maximum(0.0, c00 / length + k / length * c10) / length
    # As a sum of squares, so that a loss of 0 is not the difference of large numbers.
    return np.asarray((c01**2 + (a - c00) ** 2 + (k * a - c10) ** 2) / 2)


def follow(
    deltas: NDArray[np.float64],
    labels: pd.DataFrame,
    target: ArrayLike,
    order: Order = "shear-rotation",
) -> pd.DataFrame:
    """Return the paths of ΔW through the plane.

    ΔW = 0, as training starts, lies nowhere in it: a path begins after the first step.

    Args:
        deltas: ΔW of K runs before the first and after each step, (K, steps + 1, 2, 2).
        labels: One row per run.
        target: T.
        order: As `locate` takes it.

    Returns:
        `labels`, `step`, `angle` (in degrees, continued beyond ±180° instead of leaping), `shear`, `first_scale`,
        `second_scale` and `relative_loss` (‖ΔW − T‖² / ‖T‖², NaN where T = 0), one row for every run and step at
        which ΔW lies in the plane.
    """
    found = locate(deltas, order)
    truth = _require_square(target)
    with np.errstate(over="ignore", invalid="ignore"):
        relative = ratio(norm(deltas - truth), norm(truth)) ** 2
    if not len(deltas):
        measured = {name: np.zeros(0) for name in (*COORDINATES, "relative_loss")}
        return labels.iloc[:0].assign(step=np.zeros(0, dtype=int), **measured)
    parts = []
    for k in range(len(deltas)):
        known = np.isfinite(found.angle[k])
        columns = {
            "step": np.flatnonzero(known),
            "angle": np.degrees(np.unwrap(found.angle[k][known])),
            **{name: getattr(found, name)[k][known] for name in COORDINATES[1:]},
            "relative_loss": relative[k][known],
        }
        own = pd.DataFrame(columns)
        parts.append(
            own.assign(**{str(name): value for name, value in labels.iloc[k].items()})[[*labels.columns, *own.columns]]
        )
    return pd.concat(parts, ignore_index=True)


def measure_kinds(matrices: ArrayLike) -> tuple[Floats, Floats]:
    """Return how much of each 2 × 2 matrix is a scaled rotation, and how much is a scaled shear, (…,) and (…,).

    The share of ‖M‖² within the plane of all c R(θ), spanned by I and R(90°), and within that of all c S(k), spanned by
    I and [[0, 0], [1, 0]]. A matrix of independent normal entries has two of four equal parts in either, so that each
    share is uniform on [0, 1] (a Beta(1, 1) variable): one in twenty is above 0.95 by chance. NaN for the zero matrix.
    """
    rows = _require_square(matrices)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rows = rows / np.abs(rows).max(axis=(-2, -1), keepdims=True)
        whole = (rows**2).sum(axis=(-2, -1))
        middle = (rows[..., 0, 0] + rows[..., 1, 1]) ** 2 / 2
        rotation = (middle + (rows[..., 0, 1] - rows[..., 1, 0]) ** 2 / 2) / whole
        shear = (middle + rows[..., 1, 0] ** 2) / whole
    return rotation, shear


def describe_factors(factors: dict[str, NDArray[np.float64]], labels: pd.DataFrame) -> pd.DataFrame:
    """Return what each factor of K chains is: its place in the plane, and its shares of a rotation and of a shear.

    The factors depend on the gauge (W_i → W_i M, W_{i+1} → M⁻¹ W_{i+1}): what they are describes where training left
    them, from where they started, and not the map that they make together.

    Args:
        factors: By name, (K, 2, 2) each.
        labels: One row per run.

    Returns:
        `labels factor angle shear first_scale second_scale rotation_share shear_share`, the angle in degrees.
    """
    if not factors:
        measured = {name: np.zeros(0) for name in (*COORDINATES, "rotation_share", "shear_share")}
        return labels.iloc[:0].assign(factor=np.zeros(0, dtype=str), **measured)
    parts = []
    for name, matrices in factors.items():
        found = locate(matrices)
        rotation, shear = measure_kinds(matrices)
        parts.append(
            labels.assign(
                factor=name,
                angle=np.degrees(found.angle),
                shear=found.shear,
                first_scale=found.first_scale,
                second_scale=found.second_scale,
                rotation_share=rotation,
                shear_share=shear,
            )
        )
    return pd.concat(parts, ignore_index=True)


def count_kinds(described: pd.DataFrame, least: float = 0.95) -> pd.DataFrame:
    """Return in how many runs each factor is a rotation, and in how many a shear, up to scale.

    Args:
        described: What `describe_factors` returned. A factor that a run lacks is neither in that run.
        least: Share from which a factor counts as one.

    Returns:
        One row per factor: `factor num_runs rotations shears`, the last two as shares of the runs (1 − least for
        matrices of independent normal entries). Then a row `apart`, with both the share of runs in which one factor is
        a rotation and another one a shear, and a row `apart by chance`, the same over all ways to take each factor from
        another run: what factors that know nothing of each other have. NaN without runs, and by chance with a single
        one or with fewer runs than there are factors of either kind.
    """
    shares = {"rotations": "rotation_share", "shears": "shear_share"}
    rows: list[dict[str, Any]] = [
        {"factor": name, "num_runs": len(own), **{kind: (own[share] >= least).mean() for kind, share in shares.items()}}
        for name, own in described.groupby("factor", sort=False)
    ]
    # NaN, of a missing factor or of a zero one, is not at least anything.
    turned, sheared = (
        described.pivot(index="run", columns="factor", values=share).to_numpy(dtype=np.float64) >= least
        for share in shares.values()
    )
    for name, share in (
        ("apart", _share_apart(turned, sheared)),
        ("apart by chance", _share_apart_by_chance(turned, sheared)),
    ):
        rows.append({"factor": name, "num_runs": len(turned), "rotations": share, "shears": share})
    return pd.DataFrame(rows)


def _share_apart(turned: NDArray[np.bool_], sheared: NDArray[np.bool_]) -> float:
    """Share of rows (runs, factors) in which one factor is turned and another one sheared."""
    if not len(turned):
        return float("nan")
    pairs = turned[:, :, None] & sheared[:, None, :]
    pairs &= ~np.eye(turned.shape[1], dtype=bool)
    return float(pairs.any(axis=(1, 2)).mean())


def _share_apart_by_chance(turned: NDArray[np.bool_], sheared: NDArray[np.bool_]) -> float:
    """Mean of `_share_apart` over all ways to take every factor of a row from a run of its own.

    A row is not apart where no factor is turned, or none sheared, or one factor alone is either and is both; each of
    these asks something of every factor by itself. For one turned and one sheared factor, t and s over n runs, what is
    left is (Σt Σs − Σts) / (n (n − 1)).
    """
    either = (turned | sheared).any(axis=0)  # other factors change nothing, from whichever run they are
    turned, sheared = turned[:, either].T, sheared[:, either].T
    num_factors, num_runs = turned.shape
    if num_runs < max(2, num_factors):
        return float("nan")
    neither = ~turned & ~sheared
    alone = np.repeat(neither[None], num_factors, axis=0)
    for i in range(num_factors):
        alone[i, i] = turned[i] & sheared[i]
    ways = _count_ways(np.concatenate([np.stack([~turned, ~sheared, neither]), alone]))
    return 1 - float(ways[0] + ways[1] - ways[2] + ways[3:].sum()) / math.perm(num_runs, num_factors)


def _count_ways(allowed: NDArray[np.bool_]) -> Floats:
    """Return in how many ways all factors can be given different runs that they allow: the permanent of each matrix.

    Args:
        allowed: Stack of tables, (…, factors, runs).
    """
    num_factors, num_runs = allowed.shape[-2:]
    # By the set of factors that have a run already, as bits of its place.
    ways = np.zeros((*allowed.shape[:-2], 1 << num_factors))
    ways[..., 0] = 1
    sets = np.arange(1 << num_factors)
    for run in range(num_runs):
        before = ways.copy()
        for i in range(num_factors):
            without = sets[sets >> i & 1 == 0]
            ways[..., without | 1 << i] += before[..., without] * allowed[..., i, run, None]
    return np.asarray(ways[..., -1])


def _require_square(matrices: ArrayLike) -> Floats:
    array = np.asarray(matrices, dtype=np.float64)
    if array.shape[-2:] != (2, 2):
        raise InputError(
            "plane", expected="matrices of 2 × 2", got=f"the shape {array.shape}", do="learn a map with dim=2"
        )
    return array


def _reflect(matrices: Floats, order: Order) -> Floats:
    """Return M, or J Mᵀ J for the other order; its own inverse."""
    if order not in get_args(Order):
        raise InputError("order", expected=f"one of {', '.join(get_args(Order))}", got=repr(order), do="choose one")
    return matrices if order == "shear-rotation" else matrices.swapaxes(-1, -2)[..., ::-1, ::-1]
