"""Methods by name: what `lora-16` or `linchain-3-16` mean as a PEFT configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig

from linchain_analysis.adapters.config import LinChainConfig
from linchain_analysis.adapters.initialisation import CHAIN_INITS
from linchain_analysis.errors import InputError

FORMS = "lora-R, moslora-R[-INIT], linchain-N-R[-wWIDTH][-INIT]"

# The paper's LinChain-2-8 has the inner width 16 (its section 4.1); every other name without a width is square.
_PAPER_WIDTHS: dict[tuple[object, object], int] = {(2, 8): 16}

_LORA = re.compile(r"lora-(?P<rank>[1-9]\d*)")
_MOSLORA = re.compile(rf"moslora-(?P<rank>[1-9]\d*)(-(?P<init>{'|'.join(CHAIN_INITS)}))?")
_LINCHAIN = re.compile(
    rf"linchain-(?P<length>\d+)-(?P<rank>[1-9]\d*)(-w(?P<width>[1-9]\d*))?(-(?P<init>{'|'.join(CHAIN_INITS)}))?"
)


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
    text = name if isinstance(name, str) else ""
    if match := _LORA.fullmatch(text):
        rank = int(match["rank"])
        return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": targets, **overrides})
    length, width = 1, None
    if match := _LINCHAIN.fullmatch(text):
        length = int(match["length"])
        width = int(match["width"]) if match["width"] else _PAPER_WIDTHS.get((length, int(match["rank"])))
    else:
        match = _MOSLORA.fullmatch(text)
    if match is None:
        raise _unknown(name)
    rank = int(match["rank"])
    options = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "chain_length": length,
        "chain_width": width,
        "chain_init": match["init"] or "kaiming",
    }
    return LinChainConfig(**{**options, **overrides})


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
    if width != _PAPER_WIDTHS.get((length, rank), rank):
        name += f"-w{width}"
    init = options.get("chain_init", "kaiming")
    return name if init == "kaiming" else f"{name}-{init}"


def _unknown(name: object) -> InputError:
    if name == "full-finetune":
        return InputError(
            "method",
            expected=f"a method that adds adapters ({FORMS})",
            got="'full-finetune', which trains the model's own weights and has no PEFT configuration",
            do="train the model without get_peft_model",
        )
    return InputError(
        "method",
        expected=f"one of the forms {FORMS}, with INIT one of {', '.join(CHAIN_INITS)}",
        got=repr(name),
        do="write it like lora-16, moslora-16, linchain-3-16, linchain-2-8 or linchain-3-16-w32-he",
    )
