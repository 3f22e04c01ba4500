"""Control: full-batch training stops sharpening where its optimiser would become unstable on a quadratic.

The network is the source's smallest: one hidden layer of 100 tanh units on 20 points of a Chebyshev polynomial of
degree 4. A LoRA between two frozen layers is shown beside it, without being judged: the source has no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.func import grad, jvp

from linchain_analysis.controls.control import Control, Finding
from linchain_analysis.controls.small_networks import DEGREE, NUM_POINTS, Loss, adapt_network, draw_network, flatten
from linchain_analysis.measures.sharpness import OptimizerKind, stability_edge, top_eigenvalue
from linchain_analysis.measures.spectral import Array
from linchain_analysis.plots.drawn import Drawn
from linchain_analysis.plots.style import BLACK, BLUE, DASHES, GREEN, ORANGE, WIDTHS, paper_style

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
NUM_MEASUREMENTS = 60
SETTLED_SHARE = 0.25  # the last quarter of training
TOLERANCES: dict[OptimizerKind, float] = {"gradient_descent": 0.1, "adam": 0.2}
NAMES = {"gradient_descent": "gradient descent", "adam": "Adam"}
LEAST_RATES = 3


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        subject: `network`, or the name of the method that adapts one.
        optimizer: Which.
        learning_rate: Its rate.
        num_steps: Long enough for progressive sharpening to reach the edge of that rate.
    """

    subject: str
    optimizer: OptimizerKind
    learning_rate: float
    num_steps: int


TRAININGS = (
    Training("network", "gradient_descent", 0.15, 20000),
    Training("network", "gradient_descent", 0.3, 20000),
    Training("network", "gradient_descent", 0.6, 20000),
    Training("network", "adam", 0.001, 8000),
    Training("network", "adam", 0.002, 8000),
    Training("network", "adam", 0.004, 8000),
    Training("lora-4", "gradient_descent", 0.1, 6000),
    Training("lora-4", "gradient_descent", 0.2, 6000),
)


def measure(trainings: Sequence[Training] = TRAININGS, seed: int = 0) -> pd.DataFrame:
    """Return a row for each measurement of each training.

    Columns: subject, optimizer, learning_rate, step, share (of the training), loss, sharpness (of the preconditioned
    Hessian under Adam), edge.
    """
    return pd.DataFrame([row for training in trainings for row in _train(training, seed)])


def _train(training: Training, seed: int) -> list[dict[str, object]]:
    adapted = training.subject != "network"
    model = draw_network(seed, 2, 50, bias=1.0) if adapted else draw_network(seed)
    loss, vector = flatten(adapt_network(model, training.subject, seed) if adapted else model)
    gradient_of = grad(loss)
    first, second = torch.zeros_like(vector), torch.zeros_like(vector)
    rate, diagonal = training.learning_rate, None
    edge = stability_edge(training.optimizer, rate, BETA1)
    rows: list[dict[str, object]] = []
    for step in range(1, training.num_steps + 1):
        gradient = gradient_of(vector)
        if training.optimizer == "gradient_descent":
            vector = vector - rate * gradient
        else:
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient.square()
            # With 1 − β₁ᵗ in it, D⁻¹ times the uncorrected first moment is the step (see `top_eigenvalue`).
            diagonal = (1 - BETA1**step) * ((second / (1 - BETA2**step)).sqrt() + EPSILON)
            vector = vector - rate * first / diagonal
        if step % max(1, training.num_steps // NUM_MEASUREMENTS) == 0:
            rows.append(
                {
                    "subject": training.subject,
                    "optimizer": training.optimizer,
                    "learning_rate": rate,
                    "step": step,
                    "share": step / training.num_steps,
                    "loss": float(loss(vector)),
                    "sharpness": _sharpness(gradient_of, vector, None if diagonal is None else diagonal.numpy()),
                    "edge": edge,
                }
            )
    return rows


def _sharpness(gradient_of: Loss, vector: torch.Tensor, diagonal: Array | None) -> float:
    def multiply(direction: Array) -> Array:
        product: Array = jvp(gradient_of, (vector,), (torch.from_numpy(direction),))[1].numpy()
        return product

    return top_eigenvalue(multiply, len(vector), preconditioner=diagonal).value


def judge(table: pd.DataFrame) -> Finding:
    """Compare the median sharpness of the last quarter of each training with the edge of its rate."""
    settled = table[table["share"] > 1 - SETTLED_SHARE].assign(ratio=lambda t: t["sharpness"] / t["edge"])
    keys = ["subject", "optimizer", "learning_rate"]
    # A median would pass over what could not be measured.
    ratios = {
        (str(subject), str(optimizer), float(str(rate))): float(np.median(part["ratio"].to_numpy(dtype=float)))
        for (subject, optimizer, rate), part in settled.groupby(keys)
    }
    measured = {
        f"{subject}, {NAMES[optimizer]}, rate {rate:g}": ratio for (subject, optimizer, rate), ratio in ratios.items()
    }
    passed, parts = True, ["Judged is a network trained in full, without an adapter."]
    for optimizer, tolerance in TOLERANCES.items():
        judged = {rate: ratio for (*kind, rate), ratio in ratios.items() if kind == ["network", optimizer]}
        passed = passed and len(judged) >= LEAST_RATES
        passed = passed and all(abs(ratio - 1) <= tolerance for ratio in judged.values())
        told = ", ".join(f"{ratio:.3f} (rate {rate:g})" for rate, ratio in judged.items())
        parts.append(f"Under {NAMES[optimizer]} it settles at these multiples of its edge: {told or 'none measured'}.")
    shown = [
        f"{subject} under {NAMES[optimizer]} at {ratio:.3f} (rate {rate:g})"
        for (subject, optimizer, rate), ratio in ratios.items()
        if subject != "network"
    ]
    if shown:
        parts.append(f"Shown beside it and not judged: {', '.join(shown)}.")
    return Finding(passed, " ".join(parts), measured, table, _draw(table))


def _draw(table: pd.DataFrame) -> Drawn:
    titles = {
        ("network", "gradient_descent"): "gradient descent, edge $2/\\eta$",
        ("network", "adam"): "Adam, edge $38/\\eta$",
        ("lora-4", "gradient_descent"): "LoRA, gradient descent",
    }
    looks = ((BLUE, "-"), (ORANGE, (0, DASHES[1])), (GREEN, (0, DASHES[2])), (BLACK, (0, DASHES[3])))
    panels = [key for key in titles if ((table["subject"] == key[0]) & (table["optimizer"] == key[1])).any()]
    with paper_style():
        figure = Figure(figsize=(WIDTHS["icml-page"], 2.1), layout="constrained")
        for axes, key in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
            here = table[(table["subject"] == key[0]) & (table["optimizer"] == key[1])]
            for (rate, curve), (color, line) in zip(here.groupby("learning_rate"), looks, strict=False):
                label = f"{rate:g}" if axes.lines else f"$\\eta = {rate:g}$"
                axes.plot(curve["step"], curve["sharpness"], color=color, linestyle=line, label=label)
                axes.axhline(curve["edge"].iloc[0], color=color, linewidth=0.7)
            axes.set_ylim(0, 1.45 * here["edge"].max())
            axes.set_title(titles[key], pad=3)
            axes.set_xlabel("step")
            axes.legend(fontsize=7, handlelength=1.6, loc="upper center", ncols=3, columnspacing=0.8, handletextpad=0.4)
        figure.axes[0].set_ylabel("sharpness")
        for axes in figure.axes:
            if axes.get_title().startswith("Adam"):
                axes.set_ylabel("preconditioned sharpness")
    caption = (
        f"Sharpness (top eigenvalue of the Hessian; under Adam of D^-½ H D^-½) in full-batch training on {NUM_POINTS} "
        f"points of the Chebyshev polynomial of degree {DEGREE}. Levels: the edge of stability of each learning rate. "
        "Left and middle, judged: one hidden layer of 100 tanh units. Right, not judged: LoRA of rank 4 between the "
        "frozen hidden layers of a network of two. One seed. Sharpness depends on the gauge."
    )
    return Drawn(figure, table, caption, ())


def _run() -> Finding:
    return judge(measure())


CONTROL = Control(
    name="edge",
    title="Edge of stability",
    claim=(
        "Full-batch gradient descent settles at the sharpness 2/η, and Adam at the preconditioned sharpness "
        "(2 + 2β₁)/((1 − β₁) η) = 38/η."
    ),
    source=(
        "Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of stability, arXiv "
        "2103.00065; Cohen et al. 2022, Adaptive gradient methods at the edge of stability, arXiv 2207.14484"
    ),
    criterion=(
        f"For a network of one hidden layer, trained in full, and {LEAST_RATES} learning rates, each twice the one "
        "before, the median sharpness over the last quarter of training is within "
        f"{100 * TOLERANCES['gradient_descent']:g} % of the edge under gradient descent and within "
        f"{100 * TOLERANCES['adam']:g} % under Adam; no adapter is judged, the panel of LoRA is only shown."
    ),
    history=(
        "The thresholds are as set beforehand. The problem (Chebyshev data, 100 tanh units) was chosen by "
        "exploratory runs, and only seed 0 is run. The LoRA of rank 4 that is shown without being judged settled at "
        "0.93 and 1.00 of 2/η, and at 0.80 to 1.02 with seeds 1 and 2. One exploratory moslora-4, which has one "
        "inner factor, at η = 0.2 did not settle (2.1 times the edge) and was not looked into. That a network is "
        "judged and LoRA only shown was put into the words of the criterion after results had been seen, without a "
        "change of what is judged."
    ),
    run=_run,
)
