"""Training loops to measure: a real one, and one whose gradients come from nowhere; both with a tracker or without."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.benchmarks.timing import Array, Variant
from linchain_analysis.runs import load_run
from linchain_analysis.tracking import Tracker

MAX_NORM = 1.0


class Loop(Protocol):
    """A training loop that can be taken step by step."""

    model: Any
    optimizer: Optimizer

    def step(self) -> object:
        """Take one optimiser step."""


class TrainingLoop:
    """Forward, backward, clipping and AdamW on one batch, over and over.

    Args:
        model: A model that returns its loss.
        batch: Its input.
        clips: Whether gradients are clipped.

    Attributes:
        update_seconds: CPU seconds spent so far on clipping and the optimiser's step.
    """

    def __init__(self, model: Any, batch: Mapping[str, Tensor], *, clips: bool = True) -> None:
        self.model = model.train()
        self.parameters = trainable(model)
        self.optimizer: Optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.update_seconds = 0.0
        self._batch = batch
        self._clips = clips

    def step(self, observe: Callable[[Tensor], object] | None = None) -> None:
        """Take one step; `observe` is called with the loss before the gradients are let go."""
        loss = self.model(**self._batch).loss
        loss.backward()
        begin = time.process_time()
        if self._clips:
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.update_seconds += time.process_time() - begin
        if observe is not None:
            observe(loss)
        self.optimizer.zero_grad()


class SyntheticLoop:
    """Everything of a step except the model: a backward pass that brings given gradients, clipping, the optimiser.

    Args:
        model: Holds the parameters.
        adaptive: Train by AdamW; otherwise by SGD, which has no state and costs next to nothing.
        fresh: Whether each step has gradients of its own.
    """

    def __init__(self, model: Any, *, adaptive: bool = False, fresh: bool = False) -> None:
        self.model = model
        self.parameters = trainable(model)
        kind = torch.optim.AdamW if adaptive else torch.optim.SGD
        self.optimizer: Optimizer = kind(self.parameters, lr=1e-3)
        self._fresh = fresh
        self._generator = torch.Generator(self.parameters[0].device).manual_seed(0)
        self.gradients = self._draw()

    def step(self) -> None:
        """Take one step."""
        if self._fresh:
            self.gradients = self._draw()
        bring: Any = _Bring.apply
        loss = bring(self.gradients, *self.parameters)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _draw(self) -> list[Tensor]:
        return [
            torch.randn(parameter.shape, generator=self._generator, device=parameter.device)
            for parameter in self.parameters
        ]


class _Bring(torch.autograd.Function):
    """A loss of 1 whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.ones((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        return (None, *ctx.gradients)


_NUM_WARM = 3


class Switch:
    """Turns the tracker of a loop on and off, and keeps the seconds that it says it took.

    The tracker's patches see every backward pass and every clipping of the process. An untracked step is therefore
    one while no tracker is open, and each time the tracker is turned on it begins a new run, at B = 0 as training does:
    it would otherwise measure delta from the factors it found, at more cost. After a turn a few steps are taken outside
    the measured time, since a run's first two hold what is done once.

    Args:
        loop: The loop.
        folder: Scratch folder for the runs.
        preset: What the tracker records.
    """

    def __init__(self, loop: Loop, folder: Path, preset: str) -> None:
        self._loop = loop
        self._path = folder / "switched"
        self._preset = preset
        self._tracker: Tracker | None = None
        self._track_seconds: list[float] = []

    def variants(self, num_steps: int = 1) -> tuple[Variant, Variant]:
        """Return blocks of `num_steps` steps as variants `untracked` and `tracked`."""

        def take_block() -> None:
            for _ in range(num_steps):
                self._loop.step()

        return Variant("untracked", take_block, self.turn_off), Variant("tracked", take_block, self.turn_on)

    def turn_on(self) -> None:
        """Track from here on."""
        if self._tracker is None:
            with torch.no_grad():
                for name, parameter in self._loop.model.named_parameters():
                    if "lora_B" in name:
                        parameter.zero_()
            self._tracker = Tracker(
                self._loop.model,
                self._loop.optimizer,
                self._path,
                preset=self._preset,
                every=1,
                strict=True,
                quiet=True,
            )
            for _ in range(_NUM_WARM):
                self._loop.step()

    def turn_off(self) -> None:
        """Track no more."""
        if self._tracker is not None:
            self._tracker.close()
            self._track_seconds += list(load_run(self._tracker.path).steps["track_seconds"].iloc[_NUM_WARM:])
            shutil.rmtree(self._tracker.path)
            self._tracker = None
            self._loop.step()

    @property
    def track_seconds(self) -> Array:
        """Wall seconds of each tracked step that the tracker counted as its own, once it is turned off."""
        return np.array(self._track_seconds, dtype=np.float64)


def trainable(model: Any) -> list[nn.Parameter]:
    """Return the parameters of `model` that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
