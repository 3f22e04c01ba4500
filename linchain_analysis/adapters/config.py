"""Configuration of LinChain: PEFT's LoRA configuration plus the shape and the start of the chain."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from peft import LoraConfig, PeftType

from linchain_analysis.adapters.peft_type import LINCHAIN
from linchain_analysis.errors import InputError, UnsupportedError
from linchain_analysis.method_names import CHAIN_INITS

# PEFT marks most options that replace LoRA's product by something else; these two it does not mark.
_UNMARKED_VARIANTS = ("use_qalora", "megatron_config")


@dataclass
class LinChainConfig(LoraConfig):  # type: ignore[misc]
    """LoRA whose A is followed by a chain of inner factors: delta = scale · A W1 … Wn B.

    Every option of `peft.LoraConfig` keeps its meaning; where one cannot combine with a chain it is refused.

    Args:
        chain_length: Number n of inner factors; 0 is LoRA, 1 is MoSLoRA (arXiv 2406.11909).
        chain_width: Width between two inner factors: the widths are r, chain_width, …, chain_width, r. None means the
            rank of the module, `rank_pattern` included.
        chain_init: How the inner factors start: `kaiming` (uniform, gain 1/√3, as `torch.nn.Linear`), `he` (gain √2)
            and `lecun` (gain 1), both uniform, `orthogonal`, or `identity` (ones on the diagonal).

    Raises:
        InputError: A value is of the wrong kind or out of range.
        UnsupportedError: A LoRA variant or initialisation that a chain cannot carry.
    """

    chain_length: int = field(default=3, metadata={"help": "Number of inner factors; 0 is LoRA, 1 is MoSLoRA."})
    chain_width: int | None = field(default=None, metadata={"help": "Width between inner factors; None means r."})
    chain_init: str = field(default="kaiming", metadata={"help": f"One of {', '.join(CHAIN_INITS)}."})

    def __post_init__(self) -> None:
        given: Any = self
        self.r = _integer("r", given.r, minimum=1)
        self.chain_length = _integer("chain_length", self.chain_length, minimum=0)
        if self.chain_width is not None:
            self.chain_width = _integer("chain_width", self.chain_width, minimum=1)
        self.rank_pattern = {
            key: _integer(f"rank_pattern[{key!r}]", rank, minimum=1) for key, rank in (given.rank_pattern or {}).items()
        }
        self._check_width()
        self._check_init()
        self._check_variants()
        super().__post_init__()
        self.peft_type = PeftType(LINCHAIN)

    def widths(self, rank: int) -> tuple[int, ...]:
        """Return w_0 … w_n for a module of rank `rank`; one entry, `rank`, for n = 0."""
        inner = self.chain_width or rank
        return (rank, *[inner] * (self.chain_length - 1), rank)[: self.chain_length + 1]

    def _check_width(self) -> None:
        if self.chain_length < 2 and self.chain_width not in (None, self.r):
            raise InputError(
                "chain_width",
                expected=f"None or r = {self.r} for chain_length={self.chain_length}, where no width lies between "
                "inner factors",
                got=str(self.chain_width),
                do="leave it out, or set chain_length to 2 or more",
            )

    def _check_init(self) -> None:
        if self.chain_init not in CHAIN_INITS:
            meant = get_close_matches(str(self.chain_init).lower(), CHAIN_INITS, n=1, cutoff=0.5)
            raise InputError(
                "chain_init",
                expected=f"one of {', '.join(CHAIN_INITS)}",
                got=repr(self.chain_init),
                do=f"did you mean {meant[0]!r}" if meant else "choose one of these",
            )
        start = self.init_lora_weights
        if not isinstance(start, bool) and not (isinstance(start, str) and start.lower() == "gaussian"):
            raise UnsupportedError(
                "init_lora_weights",
                expected="True, False or 'gaussian' in a LinChainConfig",
                got=repr(start),
                do="choose one of these: other initialisations write a LoRA factor that a chain holds as a product",
            )

    def _check_variants(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value and (option.metadata.get("is_lora_variant") or option.name in _UNMARKED_VARIANTS):
                raise UnsupportedError(
                    option.name,
                    expected="unset in a LinChainConfig, because a chain cannot carry this LoRA variant",
                    got=repr(value),
                    do="leave it out, or use peft.LoraConfig",
                )


def _integer(place: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise InputError(
            place,
            expected=f"an integer of {minimum} or more",
            got=repr(value),
            do="pass a whole number in that range",
        )
    return int(value)
