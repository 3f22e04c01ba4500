"""Everything that is asked of finished adapters, in one go."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from linchain_analysis.auditing.alignment import NUM_BASE_VECTORS, BaseComparison
from linchain_analysis.auditing.base import load_adapted, load_base
from linchain_analysis.auditing.curvature import Sharpness, measure_sharpness, read_preconditioner, trainable_factors
from linchain_analysis.auditing.modules import UNUSED_SHARE, summarise_kinds, tabulate_modules
from linchain_analysis.auditing.overlap import compare_adapters
from linchain_analysis.auditing.report import Audit
from linchain_analysis.auditing.saved import SavedAdapter
from linchain_analysis.auditing.texts import Batch, load_batches, require_causal
from linchain_analysis.auditing.truncation import KEEP, FunctionalRank, measure_functional_rank, refuse_share
from linchain_analysis.errors import InputError

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # NAME or OWNER/NAME


@dataclass(frozen=True)
class Request:
    """What to find out.

    Attributes:
        model: Base model, to compare deltas with its weights.
        data: File of records or of lines, to measure the functional rank on.
        template: Layout of the prompts of records.
        num_records: How many to take.
        batch_size: Texts of one forward pass.
        keep: Share of the gain that the functional rank keeps.
        sharpness: Whether to take Hessian eigenvalues.
        learning_rate: Says where the edges of stability lie.
        optimizer_state: File of Adam's second moments.
        num_base_vectors: How many singular vectors of a base weight to know.
        unused_share: Below this share of the median norm a matrix is nearly unused.
    """

    model: str | None = None
    data: Path | None = None
    template: str | None = None
    num_records: int | None = None
    batch_size: int = 16
    keep: float = KEEP
    sharpness: bool = False
    learning_rate: float | None = None
    optimizer_state: Path | None = None
    num_base_vectors: int = NUM_BASE_VECTORS
    unused_share: float = UNUSED_SHARE

    def check(self) -> None:
        """Refuse options that lack another one.

        Raises:
            InputError: One is lacking, or a number is out of range.
        """
        if self.data is not None and self.model is None:
            raise InputError("--data", expected="--model beside it", got="none", do="name the base model")
        if self.sharpness and self.data is None:
            raise InputError("--sharpness", expected="--model and --data beside it", got="no data", do="give both")
        if self.optimizer_state is not None and not self.sharpness:
            raise InputError("--optimizer-state", expected="--sharpness beside it", got="none", do="add it")
        for option, value in (("--num-records", self.num_records), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(option, expected="at least 1", got=str(value), do="give a positive number")
        if self.num_base_vectors < 1:
            raise InputError("--top", expected="at least 1", got=str(self.num_base_vectors), do="ask for one or more")
        refuse_share(self.keep)
        if self.data is not None and not self.data.is_file():
            got = "a folder" if self.data.is_dir() else "no such file"
            raise InputError(
                f"--data {self.data}", expected="a JSON file of records or a text file", got=got, do="check the path"
            )
        if self.model is not None and _is_missing_path(self.model):
            raise InputError(
                f"--model {self.model}",
                expected="the folder of a model, or a name on the hub",
                got="no such folder",
                do="check the path",
            )


def _is_missing_path(model: str) -> bool:
    """Whether a model's name is a path at which nothing stands: no name of the hub, or in a folder that exists."""
    if Path(model).exists():
        return False
    return _HUB_NAME.fullmatch(model) is None or ("/" in model and Path(model).parent.is_dir())


def examine(adapters: Sequence[SavedAdapter], request: Request, say: Callable[[str], None] = lambda _: None) -> Audit:
    """Measure finished adapters.

    What cannot be measured is left out and said in the audit's notes.

    Args:
        adapters: What to measure.
        request: What to find out.
        say: Is told what is going on where it takes long.
    """
    request.check()
    if request.optimizer_state is not None and len(adapters) != 1:
        raise InputError(
            "--optimizer-state", expected="one adapter", got=f"{len(adapters)}", do="audit the adapter of this state"
        )
    compare = None
    if request.model is not None and any(adapter.refused is None for adapter in adapters):
        say(f"loading {request.model}")
        compare = BaseComparison(load_base(request.model, adapters[0].config), request.num_base_vectors)
        say("comparing with the base weights")
    modules = tabulate_modules(adapters, unused_share=request.unused_share, measure_more=compare)
    notes = [note for adapter in adapters for note in _notes(adapter)]
    ranks: dict[str, FunctionalRank] = {}
    sharpness: dict[str, Sharpness] = {}
    if request.data is not None and request.model is not None:
        batches: list[Batch] | None = None
        for adapter in adapters:
            if adapter.refused:
                continue
            require_causal(adapter)
            if batches is None:
                batches = load_batches(
                    request.data,
                    request.model,
                    template=request.template,
                    num_records=request.num_records,
                    batch_size=request.batch_size,
                )
            say(f"running {adapter.name} on {request.data}")
            _run(adapter, request, batches, ranks, sharpness, notes)
    overlaps = compare_adapters(adapters) if len(adapters) > 1 else pd.DataFrame()
    kinds = summarise_kinds(modules) if len(modules) else pd.DataFrame()
    return Audit(adapters, modules, kinds, overlaps, ranks, sharpness, notes)


def _run(
    adapter: SavedAdapter,
    request: Request,
    batches: Sequence[Batch],
    ranks: dict[str, FunctionalRank],
    sharpness: dict[str, Sharpness],
    notes: list[str],
) -> None:
    assert request.model is not None
    model: Any = load_adapted(request.model, adapter)
    if adapter.others:
        notes.append(f"{adapter.name}: no functional rank, because the loss gained by more than its chains")
    elif any(chain.refused for chain in adapter.chains):
        notes.append(f"{adapter.name}: no functional rank, because the delta of some modules is refused")
    else:
        ranks[adapter.name] = measure_functional_rank(model, adapter, batches, keep=request.keep)
    if request.sharpness:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" in name)
        state = request.optimizer_state
        preconditioner = None if state is None else read_preconditioner(state, trainable_factors(model))
        sharpness[adapter.name] = measure_sharpness(
            model, batches, learning_rate=request.learning_rate, preconditioner=preconditioner
        )
        if preconditioner is None:
            notes.append(f"{adapter.name}: no preconditioned sharpness, because there is no --optimizer-state")


def _notes(adapter: SavedAdapter) -> list[str]:
    found = []
    if adapter.refused:
        found.append(f"{adapter.name}: no delta, because {adapter.refused}")
    for change in adapter.others:
        found.append(f"{adapter.name}: more changed than the adapter: {change}")
    reasons: dict[str, list[str]] = {}
    for chain in adapter.chains:
        if chain.refused and chain.refused != adapter.refused:
            reasons.setdefault(chain.refused, []).append(chain.module)
    found += [f"{adapter.name}: no delta of {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return found
