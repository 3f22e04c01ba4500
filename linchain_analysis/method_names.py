"""Methods by name: what `lora-16` or `linchain-2-8-w32-orthogonal` say about a chain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from linchain_analysis.errors import InputError

# Uniform on ± gain · √(3 / fan_in), He et al. 2015 (arXiv 1502.01852), with variance gain² / fan_in.
UNIFORM_GAINS: Mapping[str, float] = MappingProxyType({"kaiming": 1 / math.sqrt(3), "he": math.sqrt(2), "lecun": 1.0})
CHAIN_INITS = (*UNIFORM_GAINS, "orthogonal", "identity")

FORMS = "lora-R, moslora-R[-INIT], linchain-N-R[-wWIDTH][-INIT]"

# The paper's LinChain-2-8 has the inner width 16 (its section 4.1); every other name without a width is square.
PAPER_WIDTHS: Mapping[tuple[object, object], int] = MappingProxyType({(2, 8): 16})

_LORA = re.compile(r"lora-(?P<rank>[1-9]\d*)")
_MOSLORA = re.compile(rf"moslora-(?P<rank>[1-9]\d*)(-(?P<init>{'|'.join(CHAIN_INITS)}))?")
_LINCHAIN = re.compile(
    rf"linchain-(?P<length>\d+)-(?P<rank>[1-9]\d*)(-w(?P<width>[1-9]\d*))?(-(?P<init>{'|'.join(CHAIN_INITS)}))?"
)


@dataclass(frozen=True)
class NamedMethod:
    """What a name says.

    Attributes:
        family: `lora`, `moslora` or `linchain`.
        rank: r, the inner size of A and B.
        chain_length: n, the number of inner factors.
        chain_width: Width between inner factors; None for r.
        chain_init: How the inner factors start, one of `CHAIN_INITS`.
    """

    family: str
    rank: int
    chain_length: int = 0
    chain_width: int | None = None
    chain_init: str = "kaiming"

    @property
    def widths(self) -> tuple[int, ...]:
        """w_0 … w_n: the columns of A, of W1, …, of Wn."""
        if self.chain_length == 0:
            return (self.rank,)
        return (self.rank, *[self.chain_width or self.rank] * (self.chain_length - 1), self.rank)


def parse_method(name: str) -> NamedMethod:
    """Return what the name of a method with adapters says.

    A width is that of the inner factors: `linchain-2-8-w32` has widths 8, 32, 8. Without one the chain is square,
    except that `linchain-2-8` is the paper's 8, 16, 8 (its square form is `linchain-2-8-w8`).

    Raises:
        InputError: The name has none of the `FORMS`.
    """
    text = name if isinstance(name, str) else ""
    if match := _LORA.fullmatch(text):
        return NamedMethod("lora", int(match["rank"]))
    if match := _MOSLORA.fullmatch(text):
        return NamedMethod("moslora", int(match["rank"]), 1, None, match["init"] or "kaiming")
    if match := _LINCHAIN.fullmatch(text):
        length, rank = int(match["length"]), int(match["rank"])
        width = int(match["width"]) if match["width"] else PAPER_WIDTHS.get((length, rank))
        return NamedMethod("linchain", rank, length, width, match["init"] or "kaiming")
    raise _unknown(name)


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
