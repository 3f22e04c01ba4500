"""What others cost that watch every step: Weights & Biases, TensorBoard, and spectra taken naively."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from linchain_analysis.benchmarks.loops import Switch, TrainingLoop
from linchain_analysis.benchmarks.rows import Row, compare, skip
from linchain_analysis.benchmarks.settings import Settings
from linchain_analysis.benchmarks.subjects import adapt_by_method, build_llama, draw_tokens
from linchain_analysis.benchmarks.timing import Variant, take_turns

NUM_PAIRS = 6

Observe = Callable[[Tensor], object]


def measure_peers(settings: Settings) -> Iterator[Row]:
    """Compare steps that a peer watches with steps that nobody watches, and the tracker's beside them."""
    hidden, num_layers = settings.size((512, 8), (32, 2))
    model = adapt_by_method(build_llama(hidden, num_layers, settings.device))
    loop = TrainingLoop(model, draw_tokens(*settings.size((8, 128), (2, 16)), device=settings.device))
    size = f"hidden-{hidden}x{num_layers}"
    pairs = settings.pairs(NUM_PAIRS)

    switch = Switch(loop, settings.folder, "standard")
    found = take_turns(switch.variants(), pairs, device=settings.device)
    switch.turn_off()
    yield compare(f"peers/tracker-standard/{size}", found["tracked"], found["untracked"], clock=settings.clock)

    naive = f"peers/naive-svdvals/{size}"
    yield _compare_observed(settings, loop, naive, lambda loss: take_naive_spectra(model), pairs)

    watchers = (
        ("tensorboard-histograms", "torch.utils.tensorboard", _compare_tensorboard),
        ("wandb-watch-all", "wandb", _compare_wandb),
    )
    for what, module, watch in watchers:
        name = f"peers/{what}/{size}"
        try:
            peer = importlib.import_module(module)
        except ImportError as error:
            yield skip(name, f"{error.name or error} is not installed")
        else:
            yield watch(settings, loop, name, peer, pairs)


def take_naive_spectra(model: Any) -> list[Tensor]:
    """Return the singular values of each delta, formed whole, in the shape of its weight."""
    return [
        torch.linalg.svdvals(module.get_delta_weight("default").detach())
        for module in model.modules()
        if hasattr(module, "get_delta_weight")
    ]


def _compare_observed(settings: Settings, loop: TrainingLoop, name: str, observe: Observe, pairs: int) -> Row:
    variants = (Variant("alone", loop.step), Variant("observed", lambda: loop.step(observe)))
    found = take_turns(variants, pairs, device=settings.device)
    return compare(name, found["observed"], found["alone"], clock=settings.clock)


def _compare_tensorboard(settings: Settings, loop: TrainingLoop, name: str, board: Any, pairs: int) -> Row:
    """Write a histogram of every trained parameter and of its gradient."""
    writer = board.SummaryWriter(str(settings.folder / "tensorboard"))
    named = [(name, parameter) for name, parameter in loop.model.named_parameters() if parameter.requires_grad]
    step = 0

    def observe(loss: Tensor) -> None:
        nonlocal step
        step += 1
        writer.add_scalar("loss", loss.detach(), step)
        for name, parameter in named:
            writer.add_histogram(name, parameter.detach(), step)
            writer.add_histogram(f"{name}.grad", parameter.grad, step)

    row = _compare_observed(settings, loop, name, observe, pairs)
    writer.close()
    return row


def _compare_wandb(settings: Settings, loop: TrainingLoop, name: str, wandb: Any, pairs: int) -> Row:
    """Let wandb watch parameters and gradients, offline."""
    run = wandb.init(mode="offline", dir=str(settings.folder), project="bench", settings=wandb.Settings(silent=True))
    watched = False

    def watch(wanted: bool) -> None:
        nonlocal watched
        if wanted and not watched:
            run.watch(loop.model, log="all", log_freq=1)
        elif watched and not wanted:
            run.unwatch(loop.model)
        watched = wanted

    variants = (
        Variant("alone", loop.step, lambda: watch(False)),
        Variant("observed", lambda: loop.step(lambda loss: run.log({"loss": loss.item()})), lambda: watch(True)),
    )
    found = take_turns(variants, pairs, device=settings.device)
    watch(False)
    run.finish()
    return compare(name, found["observed"], found["alone"], clock=settings.clock)
