"""What is recorded, by cost."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from linchain_analysis.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A named choice of measures.

    Attributes:
        name: What the user says.
        cosines: Cosines of gradients with the previous ones and with updates (keeps one copy of the gradients).
        spectra: Singular values of delta and of its update; without them their norms alone.
    """

    name: str
    cosines: bool
    spectra: bool


PRESETS = {
    "light": Preset("light", cosines=False, spectra=False),
    "standard": Preset("standard", cosines=True, spectra=True),
    # Accepted already; its own measures (orders, balance, preconditioner, snapshots) are still to come.
    "full": Preset("full", cosines=True, spectra=True),
}


def find_preset(name: str) -> Preset:
    """Return the preset called `name`."""
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise InputError(
            "preset",
            expected=" or ".join(PRESETS),
            got=repr(name),
            do=f"did you mean {close[0]!r}?" if close else "pass one of these",
        )
    return PRESETS[name]
