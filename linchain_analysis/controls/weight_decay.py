"""Control: decay of the factors cuts singular values of delta, and the more of them the longer the chain.

Gradient descent with the decay λ on each of m factors descends L + λ/2 Σ‖F_i‖². At a given product ΔW = F_1 … F_m the
smallest Σ‖F_i‖² is m Σσ^(2/m) (Srebro, Rennie & Jaakkola 2004 for m = 2, where it is twice the nuclear norm; Shang,
Liu & Cheng 2016, arXiv 1606.00668, for any m). With whitened inputs, L = ½‖ΔW − T‖², each singular value t of T
therefore ends at a σ with

    σ − t + λ σ^(2/m − 1) = 0,        or at 0.

For m = 2 that is max(t − λ, 0). For m > 2 it has no solution σ > 0 below a threshold of t, which grows with m: what is
kept shrinks less, and more is cut. Nothing here is fitted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from peft import get_peft_model
from scipy.optimize import brentq
from torch import nn

from linchain_analysis.adapters import method_config
from linchain_analysis.controls.built_in_model import trained_parameters
from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import BLACK, BLUE, ORANGE, WIDTHS, paper_style
from linchain_analysis.runs import load_run
from linchain_analysis.tracking import Tracker

Floats = NDArray[np.float64]

METHODS = {"lora-8": 2, "moslora-8-identity": 3, "linchain-3-8-identity": 5}  # and their numbers of factors
TARGET = (3.0, 2.0, 1.0, 0.7, 0.4, 0.2, 0.05)
DIM = 12
RANK = 8
DECAY = 0.1
LEARNING_RATE = 0.03  # below 2/sharpness: that of five factors is near 5 σ^(8/5) = 29
NUM_STEPS = 4000
SEEDS = (0, 1, 2)
TOLERANCE = 1e-3  # the slowest direction, t = 0.05 < λ of two factors, is down by exp(−2 · 0.03 · 0.05 · 4000) = 6e-6
_LOOKS = {2: (BLACK, "o"), 3: (ORANGE, "s"), 5: (BLUE, "^")}


def predict_sigma(target: float, num_factors: int, decay: float) -> float:
    """Return the larger root σ > 0 of σ − t + λ σ^(2/m − 1), 0 where there is none."""
    power = 2 / num_factors - 1

    def slope(sigma: float) -> float:
        return float(sigma - target + decay * sigma**power)

    if num_factors == 2 or decay == 0:
        return max(target - decay, 0.0)
    # Where the slope is smallest; to its right it grows, so that the larger root lies between there and t.
    lowest = (-power * decay) ** (1 / (1 - power))
    if lowest >= target or slope(lowest) > 0:
        return 0.0
    return float(brentq(slope, lowest, target, xtol=1e-14))


def measure(methods: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Train each method and return what the tracker says: method, num_factors, seed, step, place, sigma."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="linchain-decay-") as scratch:
        for method in methods:
            for seed in seeds:
                run = load_run(_train(Path(scratch, f"{method}-{seed}"), method, seed))
                for step, spectrum in zip(run.modules["step"], run.modules["spectrum"], strict=True):
                    found = {"step": step, "place": np.arange(1, len(spectrum) + 1), "sigma": np.asarray(spectrum)}
                    rows.append(pd.DataFrame({"method": method, "seed": seed, **found}))
    table = pd.concat(rows, ignore_index=True)
    table["num_factors"] = table["method"].map(METHODS)
    return table


def _train(folder: Path, method: str, seed: int) -> Path:
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(DIM, len(TARGET), dtype=torch.float64)).Q for _ in range(2))
    target = left @ torch.diag(torch.tensor(TARGET, dtype=torch.float64)) @ right.T
    layer = nn.Linear(DIM, DIM, bias=False)
    nn.init.zeros_(layer.weight)
    # alpha = r, so that the scale is 1 and the product of the factors is delta.
    model = get_peft_model(nn.Sequential(layer), method_config(method, target_modules=["0"], lora_alpha=RANK)).double()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=LEARNING_RATE, weight_decay=DECAY)
    inputs = torch.eye(DIM, dtype=torch.float64)
    shown = set(np.unique(np.geomspace(1, NUM_STEPS, 40).astype(int)).tolist())
    with Tracker(model, optimizer, folder, every=lambda step: step in shown, quiet=True, strict=True):
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            ((model(inputs) - target).square().sum() / 2).backward()
            optimizer.step()
    return folder


def judge(table: pd.DataFrame) -> Finding:
    """Compare the last singular values with their predictions, and the ranks of the methods."""
    last = table[table["step"] == table["step"].max()]
    goals = np.array([*TARGET, *([0.0] * (int(last["place"].max()) - len(TARGET)))])
    errors, ranks, told = {}, {}, []
    for count in _list_counts(table):
        part = last[last["num_factors"] == count]
        expected = np.array([predict_sigma(goal, count, DECAY) for goal in goals])
        errors[count] = float(np.abs(part["sigma"] - expected[part["place"].to_numpy() - 1]).max(skipna=False))
        sizes = (part["sigma"] > TOLERANCE).groupby(part["seed"]).sum()
        ranks[count] = float(sizes.mean()) if sizes.nunique() == 1 else float("nan")
        told.append(f"{ranks[count]:.0f} with {count} factors (largest error {errors[count]:.0e})")
    falls = all(ranks[more] < ranks[fewer] for fewer, more in zip(list(ranks)[:-1], list(ranks)[1:], strict=True))
    passed = len(ranks) == len(METHODS) and all(error < TOLERANCE for error in errors.values()) and falls
    measured = {f"largest error, {count} factors": error for count, error in errors.items()}
    measured |= {f"rank, {count} factors": rank for count, rank in ranks.items()}
    statement = f"Of a target of rank {len(TARGET)} the decay leaves, in every seed, a rank of {', '.join(told)}."
    drawn = _draw(table)
    return Finding(passed, statement, measured, drawn.table, drawn)


def _list_counts(table: pd.DataFrame) -> list[int]:
    return sorted(int(count) for count in table["num_factors"].unique())


def _draw(table: pd.DataFrame) -> Drawn:
    last = table[table["step"] == table["step"].max()]
    with paper_style():
        figure = Figure(figsize=(WIDTHS["neurips-page"], 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        targets = np.geomspace(0.03, 4, 400)
        for count in _list_counts(table):
            part = table[table["num_factors"] == count]
            color, marker = _LOOKS[count]
            predicted = np.array([predict_sigma(float(t), count, DECAY) for t in targets])
            left.plot(targets, predicted, color=color, linewidth=0.8)
            found = last[(last["num_factors"] == count) & (last["place"] <= len(TARGET))]
            places = found["place"].to_numpy() - 1
            label = f"{count} factors"
            left.plot(
                np.array(TARGET)[places], found["sigma"], marker, color=color, markersize=3.5, fillstyle="none",
                label=label,
            )  # fmt: skip
            sizes = (part["sigma"] > TOLERANCE).groupby([part["seed"], part["step"]]).sum().unstack("seed")
            right.plot(sizes.index, sizes, color=color, linewidth=0.8)
        left.plot(targets, targets, color="0.6", linewidth=0.6, linestyle=":")
        left.set_xscale("log")
        left.xaxis.set_major_formatter("{x:g}")
        left.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        left.set_yticks([0, 0.1, 1, 3], ["0", "0.1", "1", "3"])
        left.set_ylim(bottom=-0.03)
        left.set_xlabel("singular value t of the target")
        left.set_ylabel(r"singular value $\sigma$ of $\Delta W$")
        right.set_xscale("log")
        right.set_xlabel("optimiser step")
        right.set_ylabel(rf"number of $\sigma > {TOLERANCE:g}$")
        right.set_ylim(bottom=0)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    caption = (
        f"Gradient descent with the decay λ = {DECAY} on every factor, learning a map of rank {len(TARGET)}; marks and "
        "right-hand lines are seeds. Left: where singular values end, by the tracker's spectrum of ΔW, and where the "
        "theory says that they do (lines; dotted: σ = t). Right: how many there are."
    )
    return Drawn(figure, table, caption, ())


def _run() -> Finding:
    return judge(measure())


CONTROL = Control(
    name="weight-decay",
    title="Decay of the factors and the rank of delta",
    claim=(
        "Decay of m factors penalises Σσ^(2/m) of their product: singular values below a threshold vanish, and the "
        "threshold grows with the number of factors."
    ),
    source=(
        "Srebro, Rennie & Jaakkola 2004, Maximum-margin matrix factorization; Shang, Liu & Cheng 2016, Unified "
        "scalable equivalent formulations for Schatten quasi-norms, arXiv 1606.00668"
    ),
    criterion=(
        f"After {NUM_STEPS} steps with λ = {DECAY} every singular value of delta is within {TOLERANCE:g} of the root "
        f"of σ − t + λ σ^(2/m − 1), or of 0 where it has none, for m = 2, 3 and 5 in each of {len(SEEDS)} seeds, and "
        "the number of those above it falls with m."
    ),
    history="One seed of the target was tried before the criterion was written. Nothing was changed after that.",
    run=_run,
)
