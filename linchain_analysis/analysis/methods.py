"""The order in which methods stand in every table and legend."""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES = ("lora", "moslora", "linchain", "full-finetune")


def family_of(method: str) -> str:
    """Return the family of a method's name (`linchain` of `linchain-3-16-orthogonal`); the name itself if unknown."""
    return next((family for family in FAMILIES if re.fullmatch(rf"{family}(-.*)?", method)), method)


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Return distinct names ordered as the argument goes: LoRA, MoSLoRA, LinChain, full fine-tuning, others.

    Within a family by the numbers in the name, as numbers: `linchain-2-8` before `linchain-2-16` before `linchain-3-8`.
    """
    return sorted(set(methods), key=_order)


def _order(method: str) -> tuple[int, list[int], str]:
    family = family_of(method)
    place = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    return place, [int(number) for number in re.findall(r"\d+", method)], method
