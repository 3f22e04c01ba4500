"""One step of a training that several processes share: what each adds to it, and factors that are in parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from linchain_analysis.errors import UnsupportedError
from linchain_analysis.probes import Chain, ChainReader, Start
from linchain_analysis.probes.base import base_squares
from linchain_analysis.probes.shards import (
    ShardedFactors,
    is_sharded,
    local_part,
)
from linchain_analysis.tracking.ranks import PeerError, Ranks

logger = logging.getLogger("linchain_analysis")

# What each process tells of a step, in this order.
_STEP, _RECORDED, _HAS_LOSS, _LOSS, _GRADIENTS, _FOUND_INF = range(6)
_NUM_TOLD = 6
_NAN = float("nan")


@dataclass(frozen=True)
class JoinedStep:
    """A step as all processes saw it.

    Attributes:
        recorded: Whether it is recorded whole.
        loss: The mean over the processes that saw one.
        grad_norm: ‖g‖ over all parameters.
        found_inf: Not zero where a gradient scaler left it out.
    """

    recorded: bool
    loss: float
    grad_norm: float
    found_inf: float


class JointTraining:
    """What several processes that train one model have to do together for its tracking.

    Everything is done right after a step has ended and everybody has told that all is well: a fault in between can keep
    nobody waiting, and where a process is gone, those that remain learn it there.

    Args:
        ranks: The processes.
        chains: What is recorded.
        optimizer: What trains.
    """

    def __init__(self, ranks: Ranks, chains: Sequence[Chain], optimizer: Optimizer) -> None:
        self.ranks = ranks
        self._chains = list(chains)
        self._num_steps = 0
        self.factors = ShardedFactors(chains) if are_in_parts(chains, optimizer) else None

    @property
    def in_parts(self) -> bool:
        """Whether parameters are held in parts, so that they can be read only once a step has ended."""
        return self.factors is not None

    def join(self, *, recorded: bool, losses: Sequence[float], grad_norm: float, found_inf: float) -> JoinedStep:
        """Tell the others of a step that has just ended here, and return what it was for all.

        Args:
            recorded: Whether it is recorded whole; asked of the process that writes.
            losses: Of the backward passes here.
            grad_norm: ‖g‖, or where parameters are held in parts what this process adds to ‖g‖².
            found_inf: Not zero where a gradient scaler left it out.

        Raises:
            PeerError: Tracking has ended elsewhere, or nobody answers.
            UnsupportedError: The others have no tracker, and what this process has are parts.
        """
        self._num_steps += 1
        told = self.ranks.exchange(
            [self._num_steps, recorded, bool(losses), sum(losses) if losses else 0.0, grad_norm, found_inf]
        )
        if self.ranks.alone and self.ranks.size > 1:
            self._go_on_alone()
        elif (told[:, _STEP] != self._num_steps).any():
            self.ranks.close()
            raise PeerError("the processes do not make the same steps")
        lossy = told[:, _HAS_LOSS] > 0
        return JoinedStep(
            recorded=bool(told[0, _RECORDED]),
            loss=float(told[lossy, _LOSS].sum() / lossy.sum()) if lossy.any() else _NAN,
            grad_norm=float(np.sqrt(told[:, _GRADIENTS].sum())) if self.in_parts else grad_norm,
            found_inf=float(told[:, _FOUND_INF].max()),
        )

    def _go_on_alone(self) -> None:
        if not self.ranks.leads:
            raise PeerError("rank 0 does not track this training")
        if self.in_parts:
            raise UnsupportedError(
                "tracker",
                expected=f"a tracker in each of the {self.ranks.size} processes, since they hold parameters in parts",
                got="none in some",
                do="make it on every rank; only rank 0 writes",
            )
        logger.warning(
            "tracker: expected a tracker in each of %d processes, got none in some; `loss` is that of rank 0 alone. "
            "Make it on every rank: only rank 0 writes.",
            self.ranks.size,
        )

    def leave(self) -> None:
        """Let the others know, in the exchange that is due, that tracking has ended here."""
        self.ranks.leave(_NUM_TOLD)

    def keep_start(self, reader: ChainReader | None, known: Start | None, *, base: bool) -> Start | None:
        """Put the factors together as they were when training began, and let `reader` remember them."""
        squares: NDArray[np.float64] | None = None
        if base:
            squares = self.ranks.exchange(base_squares(self._chains)).sum(axis=0)
        start: list[Start] = []
        self._collect({"start": lambda: start.append(reader.keep_start(known, squares)) if reader else None})
        assert self.factors is not None
        self.factors.forget("start")
        return start[0] if start else None

    def read(
        self, reader: ChainReader | None, read_after: Callable[[ChainReader], None], divisor: Tensor | None
    ) -> None:
        """Put gradients and factors together and let `reader` read them, one after the other.

        Args:
            reader: Of whole factors, on the process that has it.
            read_after: Reads the factors after the step.
            divisor: What gradients have to be divided by.
        """
        assert self.factors is not None
        self.factors.take_factors("after")
        if reader is None:
            self._collect(dict.fromkeys(("gradients", "before", "after"), lambda: None))
            return
        self._collect(
            {
                "gradients": lambda: reader.read_gradients(divisor),
                "before": reader.read_before,
                "after": lambda: read_after(reader),
            }
        )

    def _collect(self, readings: dict[str, Callable[[], None]]) -> None:
        """Collect one kind after the other and read it here; a fault in reading does not keep the others waiting."""
        assert self.factors is not None
        fault: Exception | None = None
        for name, read in readings.items():
            self.factors.collect(name)
            if fault is None:
                try:
                    read()
                except Exception as error:
                    fault = error
        if fault is not None:
            raise fault

    def original(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter that trains, of a whole one."""
        return self.factors.original(parameter) if self.factors else parameter

    def of_wholes(self, rates: dict[int, float]) -> dict[int, float]:
        """Return values by the identity of a parameter for whole factors as well."""
        if self.factors is None:
            return rates
        wholes = {id(f.parameter): self.factors.original(f.parameter) for c in self.factors.chains for f in c.factors}
        return {whole: rates[id(original)] for whole, original in wholes.items() if id(original) in rates}


def are_in_parts(chains: Sequence[Chain], optimizer: Optimizer) -> bool:
    """Whether several processes hold parameters, or the frozen weights under them, together."""
    parameters = [factor.parameter for chain in chains for factor in chain.factors]
    parameters += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    bases = [chain.base_weight for chain in chains]
    return any(is_sharded(tensor) for tensor in (*parameters, *bases) if tensor is not None)


def local_scalar(value: Any) -> Tensor:
    """Return a number, or the first one in a tensor, as a float64 scalar, without communication; NaN for None."""
    if not isinstance(value, Tensor):
        return torch.tensor(_NAN if value is None else float(value), dtype=torch.float64)
    if is_sharded(value) and not all(placement.is_replicate() for placement in cast(Any, value).placements):
        return torch.tensor(_NAN, dtype=torch.float64)
    return local_part(value).reshape(-1)[:1].reshape(()).double()
