"""Streams of random numbers of one data seed: one for each part of a map, and one for the fresh inputs of each step."""

from __future__ import annotations

import numpy as np

TARGET, INPUTS, NOISE, OBSERVED, STEPS = range(5)
_WORD = 32  # bits that NumPy takes of an integer at a time


def open_stream(seed: int, part: int, step: int = 0) -> np.random.Generator:
    """Return a stream that no other seed, part or step has, so that a target is the same whatever it is learned from.

    NumPy joins the 32-bit words of all integers that it is given, and zeros at the end change nothing: of [2³², 0] and
    [0, 1] it makes one stream. Here each word has its place, and the words of a seed that come after its first are
    counted: low word, part, step, number of further words, further words.

    Args:
        seed: At least 0.
        part: `TARGET`, `INPUTS`, `NOISE`, `OBSERVED`, or `STEPS` for inputs that are drawn at every step.
        step: Counted from 1, below 2³²; 0 for a part that is drawn once.
    """
    low, further = int(seed) & ((1 << _WORD) - 1), []
    left = int(seed) >> _WORD
    while left:
        further.append(left & ((1 << _WORD) - 1))
        left >>= _WORD
    return np.random.default_rng([low, part, step, len(further), *further])
