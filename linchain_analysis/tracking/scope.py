"""What of a training can be recorded, and by which processes; what cannot is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from linchain_analysis.probes import Chain
from linchain_analysis.probes.chains import name_flattening
from linchain_analysis.probes.shards import find_accumulators, name_sharded
from linchain_analysis.tracking.adapter_states import find_frozen_adapters
from linchain_analysis.tracking.joint import are_in_parts
from linchain_analysis.tracking.presets import NOISE, Selection
from linchain_analysis.tracking.ranks import Ranks, find_ranks

logger = logging.getLogger("linchain_analysis")


def find_training(
    chains: Sequence[Chain], model: nn.Module, optimizer: Optimizer, name: str
) -> tuple[list[Chain], list[str], Ranks | None]:
    """Return what of a training can be recorded, and the processes that share it.

    Args:
        chains: What the optimiser trains.
        model: What trains.
        optimizer: What trains it.
        name: Of what is recorded of it.

    Returns:
        The chains that this process holds in matrices, whole or in parts; the names of what keeps others, of which and
        of whose gradients nothing can be told; the processes, None where this one is by itself.
    """
    managed = find_accumulators(model)
    chains = name_sharded(chains, managed)
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    factors = [factor.parameter for chain in chains for factor in chain.factors]
    flat = list(dict.fromkeys(found for p in (*factors, *optimized) if (found := name_flattening(p))))
    kept = [chain for chain in chains if not any(name_flattening(factor.parameter) for factor in chain.factors)]
    # Not the shapes of flat pieces, which differ from process to process.
    shapes = [(chain.module, factor.name, tuple(factor.parameter.shape)) for chain in kept for factor in chain.factors]
    topic = repr((name, len(chains), shapes, [len(group["params"]) for group in optimizer.param_groups]))
    ranks = find_ranks(topic, in_parts=are_in_parts(kept, optimizer))
    own = {*managed, *(id(parameter) for parameter in model.parameters())}
    if ranks and optimized and not flat and not any(id(parameter) in own for parameter in optimized):
        kept, flat = [], ["an optimiser with copies of its own, as those of DeepSpeed"]
    return kept, flat, ranks


def report_training(flat: Sequence[str], ranks: Ranks | None, chosen: Selection) -> None:
    """Warn of what is not recorded of a training that several processes share."""
    for name in flat:
        logger.warning(
            "tracker: expected parameters that are whole, or sharded by torch's fully_shard, got those of %s; "
            "their modules and `grad_norm` are not recorded. Use fully_shard (accelerate: fsdp_version 2).",
            name,
        )
    left_out = [measure.name for measure in chosen.measures if "tokens" in measure.needs] + [NOISE] * chosen.noise
    if ranks and left_out:
        logger.warning(
            "tracker: %s are not recorded of a training on several processes, for each sees the tokens of its own "
            "share alone.",
            ", ".join(left_out),
        )


def report_chains(model: nn.Module, chains: Sequence[Chain], num_found: int) -> None:
    """Warn where nothing is left to be recorded but `steps`, and of modules whose delta is not.

    Args:
        model: What trains.
        chains: What is recorded of it.
        num_found: How many there were before `include` and `exclude`.
    """
    if num_found and not chains:
        logger.warning(
            "tracker: expected include and exclude to leave some of %d modules, got none; only the table `steps` "
            "is recorded. They are regular expressions for names such as those in `model.named_modules()`.",
            num_found,
        )
    elif not chains:
        frozen = [finding.message[:1].upper() + finding.message[1:] for finding in find_frozen_adapters(model)]
        logger.warning(
            "tracker: expected a model with a trainable PEFT adapter, found none; only the table `steps` is "
            "recorded. %s",
            *(frozen or ["Call get_peft_model before the tracker is made, and give it the model that trains."]),
        )
    refused = {chain.refused: chain.module for chain in chains if chain.refused}
    for reason, module in refused.items():
        logger.warning(
            "tracker: delta of %s (and others alike) is not recorded: %s. Its gradients and updates are.",
            module,
            reason,
        )
