"""Why an adapter as a whole gets no gradient: it is disabled, merged, not the active one, or frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.xlora.layer import XLoraLayer
from torch import nn

from linchain_analysis.probes import Chain
from linchain_analysis.tracking.announcements import Finding
from linchain_analysis.tracking.subjects import Mask, Subjects

STATES = ("adapter_disabled", "adapter_merged", "adapter_inactive", "adapter_frozen")

_LOAD = (
    "an adapter that goes on training is loaded with PeftModel.from_pretrained(..., is_trainable=True), before the "
    "optimiser is made"
)


def sort_by_state(chains: Sequence[Chain], silent: Mask, required: Mask, learning: bool) -> dict[str, Mask]:
    """Return which of the modules that get no gradient are so by the state of their adapter, by name of that state.

    Args:
        chains: The modules that are recorded.
        silent: Which of them had no gradient so far and did not move.
        required: Which have a factor that requires a gradient.
        learning: Whether any other module learns. A frozen adapter beside one that learns is as it should be.

    Returns:
        Masks over the modules for the names in `STATES`, and for `aside` those that nobody has to be told of.
    """
    found = {name: np.zeros(len(chains), dtype=bool) for name in (*STATES, "aside")}
    for number in np.flatnonzero(silent).tolist():
        chain = chains[number]
        layer = chain.adapted
        if layer is None:
            continue
        if layer.disable_adapters:
            found["adapter_disabled"][number] = True
        elif layer.merged:
            found["adapter_merged"][number] = True
        elif chain.adapter not in layer.active_adapters:
            found["aside" if learning and not required[number] else "adapter_inactive"][number] = True
        elif not required[number] and not learning:
            found["adapter_frozen"][number] = True
    return found


def describe_states(chains: Sequence[Chain], subjects: Subjects, found: dict[str, Mask]) -> list[Finding]:
    """Put what `sort_by_state` found in words."""
    findings = []
    for name in STATES:
        mask = found[name]
        if not mask.any():
            continue
        concerned = [chains[number] for number in np.flatnonzero(mask).tolist()]
        subject = subjects.modules(mask)
        adapter = _quoted(chain.adapter for chain in concerned)
        active = _quoted(a for chain in concerned if chain.adapted for a in chain.adapted.active_adapters)
        message = {
            "adapter_disabled": f"the adapters of {subject} are disabled, so none of them gets a gradient; call "
            "model.enable_adapter_layers() (or enable_adapters()) before training",
            "adapter_merged": f"the adapters of {subject} are merged into the base weight, where they get no "
            "gradient; call model.unmerge_adapter() before training",
            "adapter_inactive": f"the active adapter is {active}, and {adapter} ({subject}), which this run is about, "
            f"gets no gradient; call model.set_adapter({adapter}) before the optimiser is made",
            "adapter_frozen": f"no factor of adapter {adapter} ({subject}) requires a gradient; {_LOAD}",
        }[name]
        findings.append(Finding(name, subject, f"{message}.", len(concerned)))
    return findings


def find_frozen_adapters(model: nn.Module) -> list[Finding]:
    """Say why no adapter of `model` trains, of which none has a factor that requires a gradient; empty without one."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    held: dict[str, list[nn.Parameter]] = {}
    for layer in layers:
        if isinstance(getattr(layer.forward, "__self__", None), XLoraLayer):
            return []  # its router trains, and its adapters are frozen by intention
        for attribute in layer.adapter_layer_names:
            holder = getattr(layer, attribute, None)
            for name in holder if isinstance(holder, (nn.ModuleDict, nn.ParameterDict)) else ():
                item = holder[name]  # type: ignore[index]
                held.setdefault(name, []).extend([item] if isinstance(item, nn.Parameter) else item.parameters())
    if not held or any(parameter.requires_grad for parameters in held.values() for parameter in parameters):
        return []
    subject = f"all {len(layers)} adapted modules" if len(layers) > 1 else "the adapted module"
    if any(layer.disable_adapters for layer in layers):
        advice = "adapters are disabled; call model.enable_adapter_layers() (or enable_adapters()) before training"
        return [Finding("adapter_disabled", subject, f"{advice}.", len(layers))]
    message = f"no factor of adapter {_quoted(held)} ({subject}) requires a gradient; {_LOAD}."
    return [Finding("adapter_frozen", subject, message, len(layers))]


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(repr(name) for name in names))
