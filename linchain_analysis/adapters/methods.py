"""Methods by name: what `lora-16` or `linchain-3-16` mean as a PEFT configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig

from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.method_names import PAPER_WIDTHS, parse_method


def method_config(name: str, target_modules: Sequence[str] | str | None = None, **overrides: Any) -> LoraConfig:
    """Return the PEFT configuration of a named method; `lora-R` is PEFT's own `LoraConfig`.

    alpha is 2 R. A width is that of the inner factors: `linchain-2-8-w32` has widths 8, 32, 8. Without one the chain
    is square, except that `linchain-2-8` is the paper's 8, 16, 8 (its square form is `linchain-2-8-w8`).

    Args:
        name: `lora-R`, `moslora-R[-INIT]` or `linchain-N-R[-wWIDTH][-INIT]`.
        target_modules: As in `peft.LoraConfig`; None leaves the choice to PEFT.
        **overrides: Any other option of the configuration, which wins over the name's.

    Raises:
        InputError: The name has none of these forms.
    """
    targets = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    method = parse_method(name)
    shared = {"r": method.rank, "lora_alpha": 2 * method.rank, "target_modules": targets}
    if method.family == "lora":
        return LoraConfig(**{**shared, **overrides})
    chain = {
        "chain_length": method.chain_length,
        "chain_width": method.chain_width,
        "chain_init": method.chain_init,
    }
    return LinChainConfig(**{**shared, **chain, **overrides})


def method_name(options: Mapping[str, Any]) -> str:
    """Return the name of the method that a PEFT configuration describes: the inverse of `method_config`.

    Args:
        options: The configuration's options by name, as an object has them or as its JSON file says them.
    """
    kind = str(getattr(options["peft_type"], "value", options["peft_type"])).lower()
    rank = options.get("r")
    if kind != "linchain":
        start = options.get("init_lora_weights", True)
        parts = [kind if rank is None else f"{kind}-{rank}"]
        parts += [variant for variant in ("rslora", "dora") if options.get(f"use_{variant}")]
        return "-".join([*parts, start.lower()] if isinstance(start, str) else parts)
    length, width = options.get("chain_length", 1), options.get("chain_width") or rank
    name = f"moslora-{rank}" if length == 1 else f"linchain-{length}-{rank}"
    if width != PAPER_WIDTHS.get((length, rank), rank):
        name += f"-w{width}"
    init = options.get("chain_init", "kaiming")
    return name if init == "kaiming" else f"{name}-{init}"
