"""Paper style: sizes, fonts, and one colour and one line style for each method, everywhere."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl

from linchain_analysis.analysis.methods import sort_methods
from linchain_analysis.errors import InputError
from linchain_analysis.method_names import parse_method

# Text widths in inches: one column and the whole page.
WIDTHS = {
    "icml-column": 3.25,
    "icml-page": 6.75,
    "neurips-page": 5.5,
    "acl-column": 3.03,
    "acl-page": 6.30,
}

# Okabe & Ito 2008, Color universal design: told apart with every common colour blindness. Their yellow is left out:
# on white paper a thin yellow line cannot be seen.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

DISC = "o"
Dash = tuple[float, ...]
SOLID: Dash = ()
# On and off lengths in line widths; different enough to be told apart in grey.
DASHES: tuple[Dash, ...] = (
    SOLID,
    (5.0, 1.8),
    (1.3, 1.2),
    (6.0, 1.5, 1.2, 1.5),
    (9.0, 2.5),
    (3.0, 1.2, 1.2, 1.2, 1.2, 1.2),
    (2.4, 1.0),
    (1.0, 2.6),
)


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn.

    Attributes:
        color: Hexadecimal colour.
        dash: On and off lengths in line widths; empty for a solid line.
        marker: Of points; a disc unless inner factors start otherwise than by default. Methods whose points are not
            drawn must differ as well, so it makes no style another one.
    """

    color: str
    dash: Dash
    marker: str = field(default=DISC, compare=False)

    @property
    def linestyle(self) -> Literal["-"] | tuple[float, Dash]:
        """The dash as matplotlib takes it."""
        return (0, self.dash) if self.dash else "-"

    def mark(self, size: float) -> dict[str, Any]:
        """Return how points are drawn, as matplotlib takes it: discs full, other markers larger and hollow."""
        if self.marker == DISC:
            return {"marker": DISC, "markersize": size}
        return {"marker": self.marker, "markersize": 1.6 * size, "markerfacecolor": "white", "markeredgewidth": 0.8}


KNOWN = {
    "lora-16": MethodStyle(BLACK, SOLID),
    "moslora-16": MethodStyle(ORANGE, DASHES[1]),
    "linchain-2-8": MethodStyle(GREEN, DASHES[2]),
    "linchain-3-16": MethodStyle(BLUE, DASHES[3]),
    "full-finetune": MethodStyle(VERMILION, DASHES[4]),
}
# By the number of inner factors, as those of the paper; and how many dashes an init is away from theirs.
_COLORS = (BLACK, ORANGE, GREEN, BLUE, PURPLE, VERMILION, SKY)
_SHIFTS = {"kaiming": 0, "orthogonal": 4, "identity": 6, "he": 2, "lecun": 3}
_MARKERS = {"kaiming": DISC, "orthogonal": "s", "identity": "D", "he": "^", "lecun": "v"}
_FREE = tuple(
    style
    for dash in DASHES
    for color in (PURPLE, SKY, VERMILION, BLUE, GREEN, ORANGE, BLACK)
    if (style := MethodStyle(color, dash)) not in KNOWN.values()
)


def assign_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """Return a style for each method, different for all of them, in the order of `sort_methods`.

    The methods of the paper always look the same. Another chain has the colour of its number of inner factors, the
    dash of that and its init, and the marker of its init; any other method has a place by its name, the same in every
    process. Where two methods fall on one style the later takes the next free one.

    Args:
        methods: Names; up to 56 have styles of their own, after which they repeat.
    """
    names = sort_methods(methods)
    styles: dict[str, MethodStyle] = {}
    taken = {KNOWN[method] for method in names if method in KNOWN}
    for method in names:
        if method in KNOWN:
            styles[method] = KNOWN[method]
            continue
        place = zlib.crc32(method.encode()) % len(_FREE)
        order = [*_wish(method), *_FREE[place:], *_FREE[:place]]
        styles[method] = next((style for style in order if style not in taken), _FREE[place])
        taken.add(styles[method])
    return styles


def _wish(method: str) -> list[MethodStyle]:
    """The styles that say what the name of a chain says, its own first; none for a name that cannot be read."""
    try:
        chain = parse_method(method)
    except InputError:
        return []
    color = _COLORS[chain.chain_length % len(_COLORS)]
    place = (chain.chain_length + _SHIFTS[chain.chain_init]) % len(DASHES)
    marker = _MARKERS[chain.chain_init]
    return [MethodStyle(color, dash, marker) for dash in [*DASHES[place:], *DASHES[:place]]]


PAPER: dict[Any, Any] = {
    # Type 42 keeps glyphs as TrueType outlines; submission systems refuse the Type 3 that matplotlib writes otherwise.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    # STIX comes with matplotlib, so a figure looks the same on every machine, and it sits well beside Times.
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "ytick.minor.width": 0.4,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "savefig.dpi": 200,
    "figure.dpi": 200,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw and save in paper style inside this block; matplotlib's defaults come first, so no user setting leaks in."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(PAPER)
        yield
