"""Make `PeftType.LINCHAIN` exist: PEFT has no hook for methods from outside, so its enum is extended."""

from __future__ import annotations

from typing import Any

from peft import PeftType

LINCHAIN = "LINCHAIN"


def extend_peft_types() -> None:
    """Add the member to `peft.PeftType`, once.

    A plain string would not do: PEFT, transformers and the Trainer read `.value` of a config's type, and
    `PeftType("LINCHAIN")` reads saved configurations. What is set here is what `enum.EnumType` sets for a member.
    """
    if LINCHAIN in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, LINCHAIN)
    member._name_ = LINCHAIN
    member._value_ = LINCHAIN
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[LINCHAIN] = member
    PeftType._value2member_map_[LINCHAIN] = member
    PeftType._member_names_.append(LINCHAIN)
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.12 and later look values up here first
        PeftType._hashable_values_.append(LINCHAIN)
    type.__setattr__(PeftType, LINCHAIN, member)


extend_peft_types()
