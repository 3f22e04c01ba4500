"""Factors that several processes hold in parts (`DTensor`), put together on the one that reads them.

During a step each process copies its own parts, which takes no communication; once the step has ended and everybody is
known to be there, they are collected, one kind of them (gradients, factors before, factors after) after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from linchain_analysis.errors import InputError
from linchain_analysis.probes.chains import Chain

_READER = 0  # the rank on which factors are put together


def is_sharded(tensor: Tensor) -> bool:
    """Whether several processes hold `tensor` together."""
    return type(tensor).__name__ == "DTensor"


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, detached, without communication."""
    held: Any = tensor
    part: Tensor = held.to_local() if is_sharded(held) else held
    return part.detach()


def counts_here(tensor: Tensor) -> bool | None:
    """Whether the part of `tensor` that this process holds is counted here, so that each number counts once.

    None where parts have to be added up to be numbers of `tensor` at all.
    """
    if not is_sharded(tensor):
        return distributed.get_rank() == _READER
    spec: Any = tensor
    if any(placement.is_partial() for placement in spec.placements):
        return None
    here = spec.device_mesh.get_coordinate()
    if here is None:
        return False
    pairs = zip(here, spec.placements, strict=True)
    return all(not placement.is_replicate() or place == 0 for place, placement in pairs)


def square_of_shard(tensor: Tensor) -> float:
    """Return what this process adds to ‖tensor‖²."""
    counts = counts_here(tensor)
    if counts is None:
        return float("nan")
    return float(torch.linalg.vector_norm(local_part(tensor), dtype=torch.float64)) ** 2 if counts else 0.0


class ShardedFactors:
    """The factors of some chains, each held in parts.

    Args:
        chains: The chains; factors that this process holds whole are read here as well.

    Attributes:
        chains: The same, with a whole factor in the place of each, on the process that reads; what these hold is what
            was last collected.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._reads = distributed.get_rank() == _READER
        parameters = {id(f.parameter): f.parameter for chain in chains for f in chain.factors}
        self._wholes: dict[int, nn.Parameter] = {}  # by the identity of the parameter
        self._originals: dict[int, nn.Parameter] = {}  # by that of its whole
        parcels: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters.values():
            parcels[_parcel_key(parameter)].append(parameter)
        self._parcels: list[_Parcel | _Rest] = []
        for key, members in parcels.items():
            parcel = _Rest(members) if key is None else _Parcel(members, reads=self._reads)
            self._parcels.append(parcel)
            if self._reads:
                self._adopt(members, parcel)
        self._presence: dict[int, bool] = {}
        self._divisor: Tensor | None = None
        self.chains: list[Chain] = []
        if self._reads:
            self.chains = [
                replace(
                    chain,
                    factors=tuple(replace(f, parameter=self._wholes[id(f.parameter)]) for f in chain.factors),
                )
                for chain in chains
            ]

    def _adopt(self, members: Sequence[nn.Parameter], parcel: _Parcel | _Rest) -> None:
        for parameter, whole in zip(members, parcel.wholes(), strict=True):
            made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            self._wholes[id(parameter)], self._originals[id(made)] = made, parameter

    def original(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter that trains, of a whole one."""
        return self._originals.get(id(parameter), parameter)

    def whole(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the whole one, of a parameter that trains."""
        return self._wholes.get(id(parameter), parameter)

    @property
    def divisor(self) -> Tensor | None:
        """What gradients as they are collected still have to be divided by."""
        return self._divisor

    @torch.no_grad()
    def take_gradients(self, divisor: Tensor | None) -> None:
        """Copy this process's parts of the gradients."""
        self._divisor = None if divisor is None else divisor.detach().clone()
        self._presence = {
            id(parameter): parameter.grad is not None for parcel in self._parcels for parameter in parcel.parameters
        }
        for parcel in self._parcels:
            parcel.take("gradients", [parameter.grad for parameter in parcel.parameters])

    @torch.no_grad()
    def take_factors(self, name: str) -> None:
        """Copy this process's parts of the factors as they are now, under a name for that moment."""
        for parcel in self._parcels:
            parcel.take(name, list(parcel.parameters))

    @torch.no_grad()
    def collect(self, name: str) -> None:
        """Put together what every process copied under `name`; all of them have to call this at the same time.

        On the process that reads, the whole factors hold it from now on, and of gradients their `grad` does.
        """
        for parcel in self._parcels:
            parcel.collect(name)
        for number, whole in self._wholes.items():
            # Both are the same memory: what is read of one kind is kept by the reader, before the next one comes.
            whole.grad = whole.detach() if name == "gradients" and self._presence[number] else None

    def forget(self, name: str) -> None:
        """Give the memory of what was copied under `name` back."""
        for parcel in self._parcels:
            parcel.taken.pop(name, None)


@dataclass
class _Shelf:
    """Parameters of one shape in a parcel: `count` blocks of `rows` × `width` numbers from `start` on."""

    start: int
    count: int
    rows: int
    width: int
    shape: tuple[int, ...]
    whole: Tensor | None = None  # (count, size · rows, width), the last rows padding


class _Parcel:
    """Parameters whose rows are spread over the processes of one group: they travel together.

    Rows are spread as `torch.chunk` spreads them: the last processes may hold fewer, or none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, reads: bool) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[tuple(parameter.shape)].append(parameter)
        self._given = list(parameters)
        self.parameters = [parameter for alike in by_shape.values() for parameter in alike]
        first: Any = parameters[0]
        mesh, axis = first.device_mesh, _shard_axis(first)
        self._group = mesh.get_group(axis)
        self._size = mesh.size(axis)
        # Where rows are replicated, only one of their groups holds the process that reads.
        self._takes_part = _READER in distributed.get_process_group_ranks(self._group)
        self._reads = reads
        self._dtype = first.dtype
        # Not the factors' own device: those that are kept on the host travel over what the processes are joined by.
        kind = mesh.device_type
        self._device = torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else "cpu"
        self._shelves: list[_Shelf] = []
        self._places: list[tuple[int, int]] = []  # where each parameter starts, and what it may take there
        length = 0
        for shape, alike in by_shape.items():
            rows, width = -(-shape[0] // self._size), prod(shape[1:])
            shelf = _Shelf(length, len(alike), rows, width, shape)
            self._shelves.append(shelf)
            for j in range(len(alike)):
                self._places.append((length + j * rows * width, rows * width))
            length += len(alike) * rows * width
            if reads:
                shelf.whole = self._empty(len(alike), self._size * rows, width)
        self._length = length
        self._received = self._empty(self._size, length) if reads else None
        self.taken: dict[str, Tensor] = {}

    def wholes(self) -> list[Tensor]:
        """Views of the whole parameters, in the order in which they were given."""
        found: dict[int, Tensor] = {}
        members = iter(self.parameters)
        for shelf in self._shelves:
            assert shelf.whole is not None
            for block in shelf.whole:
                found[id(next(members))] = block[: shelf.shape[0]].view(shelf.shape)
        return [found[id(parameter)] for parameter in self._given]

    def take(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Copy this process's parts of `tensors`, zero for those that are not there."""
        if not self._takes_part:
            return
        if name not in self.taken:
            self.taken[name] = torch.zeros(self._length, dtype=self._dtype, device=self._device)
        flat = self.taken[name]
        targets, sources = [], []
        for (start, room), tensor in zip(self._places, tensors, strict=True):
            if tensor is None:
                flat[start : start + room].zero_()
                continue
            part = local_part(tensor)
            if part.numel():
                targets.append(flat[start : start + part.numel()].view(part.shape))
                sources.append(part)
        if targets:
            torch._foreach_copy_(targets, sources)

    def collect(self, name: str) -> None:
        """Bring what all copied under `name` to the process that reads, in one go."""
        if not self._takes_part:
            return
        received = None if self._received is None else list(self._received.unbind())
        distributed.gather(self.taken[name], received, dst=_READER, group=self._group)
        if self._received is None:
            return
        for shelf in self._shelves:
            assert shelf.whole is not None
            blocks = self._received[:, shelf.start : shelf.start + shelf.count * shelf.rows * shelf.width]
            blocks = blocks.view(self._size, shelf.count, shelf.rows, shelf.width).permute(1, 0, 2, 3)
            shelf.whole.view(blocks.shape).copy_(blocks)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


@dataclass
class _Rest:
    """Parameters that are spread in any other way, one by one, or that every process holds whole."""

    parameters: list[nn.Parameter]
    taken: dict[str, list[Tensor]] = field(default_factory=dict)
    _wholes: list[Tensor] = field(default_factory=list)

    def wholes(self) -> list[Tensor]:
        """Memory for the whole parameters."""
        self._wholes = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in self.parameters]
        return self._wholes

    def take(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Copy this process's parts of `tensors`, zero for those that are not there."""
        pairs = zip(self.parameters, tensors, strict=True)
        self.taken[name] = [
            (torch.zeros_like(parameter) if tensor is None else tensor).detach().clone() for parameter, tensor in pairs
        ]

    def collect(self, name: str) -> None:
        """Put together what all copied under `name`."""
        held: Any
        for index, held in enumerate(self.taken[name]):
            whole = held.full_tensor() if is_sharded(held) else held
            if self._wholes:
                self._wholes[index].copy_(whole)


def _parcel_key(parameter: Any) -> Any:
    """What parameters that travel together have in common; None for those that go one by one."""
    axis = _shard_axis(parameter) if is_sharded(parameter) else None
    if axis is None:
        return None
    mesh = parameter.device_mesh
    if mesh.get_coordinate() is None or (mesh.mesh == _READER).sum() == 0:
        raise InputError(
            "tracker",
            expected="rank 0 among those that hold each factor",
            got=f"a factor on {mesh}",
            do="track a model that is not spread by layers",
        )
    return id(mesh.get_group(axis)), parameter.dtype


def _shard_axis(parameter: Any) -> int | None:
    """The axis of the mesh along which rows are spread, if all others only repeat them."""
    plain = distributed.tensor.Shard
    axes = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(axes) != 1 or parameter.dim() == 0:
        return None
    placement = parameter.placements[axes[0]]
    return axes[0] if type(placement) is plain and placement.dim == 0 else None


def find_accumulators(model: nn.Module) -> dict[int, Any]:
    """Return by the identity of each parameter that `fully_shard` manages in `model` what torch keeps about it.

    Gradients that are accumulated without communication are kept there, and not by the parameter.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        try:
            state = cast(Any, module)._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            found |= {id(kept.sharded_param): kept for group in groups if group for kept in group.fsdp_params}
        except AttributeError:  # another torch: such backward passes are not told from those of other models
            return {}
    return found


def name_sharded(chains: Sequence[Chain], managed: Mapping[int, Any]) -> list[Chain]:
    """Return `chains` with the parameters that train, where `fully_shard` shows what it has put together of them.

    Args:
        chains: As they are found in a model.
        managed: What `find_accumulators` found there.
    """
    shown = {id(kept._unsharded_param): kept.sharded_param for kept in managed.values() if _shows_whole(kept)}
    if not shown:
        return list(chains)
    return [
        replace(
            chain,
            factors=tuple(replace(f, parameter=shown.get(id(f.parameter), f.parameter)) for f in chain.factors),
        )
        for chain in chains
    ]


def _shows_whole(kept: Any) -> bool:
    return hasattr(kept, "_unsharded_param") and hasattr(kept, "sharded_param")


def accumulated(kept: Any) -> Tensor | None:
    """Return the gradient that `find_accumulators` knows of a parameter and the parameter does not."""
    gradient = getattr(kept, "unsharded_accumulated_grad", None)
    if gradient is None:
        gradient = getattr(getattr(kept, "_unsharded_param", None), "grad", None)
    return gradient if isinstance(gradient, Tensor) else None
