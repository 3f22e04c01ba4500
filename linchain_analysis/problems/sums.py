"""The built-in problem: two-step sums told in words, answered with a number.

"Tom has 8 figs, gets 4, sells 3:" is answered "9". A problem is a triple of numbers (start, first
change, second change) in some wording. Triples, not wordings, are divided into trained and held-out ones, so that no
held-out record can be answered by remembering: its numbers never met in training, nor in the text on which the
built-in model was pretrained.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache

from linchain_analysis.problems.records import Record

PEOPLE = {
    "Tom": "He", "Ann": "She", "Ben": "He", "Eva": "She", "Max": "He", "Ida": "She", "Leo": "He", "Mia": "She",
    "Sam": "He", "Zoe": "She", "Jim": "He", "Kim": "She",
}  # fmt: skip
OBJECTS = ("figs", "nuts", "pens", "eggs", "caps", "toys", "cups", "keys", "pears", "coins", "books", "cards")
GAINS = ("gets", "finds", "buys", "wins")
LOSSES = ("loses", "sells", "drops", "gives")
LARGEST = 20  # of every number in a problem, its answer and what is held in between included

_STARTS = range(1, 13)
_CHANGES = tuple(change for size in range(1, 10) for change in (size, -size))
_HELD_OUT_BYTES = 51  # of 256: a fifth of the triples

Triple = tuple[int, int, int]


def is_held_out(triple: Triple) -> bool:
    """Return whether a problem with these numbers may only be asked, never trained on.

    Decided by a hash of the numbers alone, so that it is the same in every version of Python and of this package.
    """
    return hashlib.sha256("{} {:+} {:+}".format(*triple).encode()).digest()[0] < _HELD_OUT_BYTES


@cache
def list_triples(*, held_out: bool) -> tuple[Triple, ...]:
    """Return every (start, change, change) of one kind whose running value stays in 0 … `LARGEST`."""
    return tuple(
        (start, first, second)
        for start in _STARTS
        for first in _CHANGES
        for second in _CHANGES
        if 0 <= start + first <= LARGEST
        and 0 <= start + first + second <= LARGEST
        and is_held_out((start, first, second)) is held_out
    )


def tell_change(change: int, generator: random.Random) -> str:
    """Return a gain or a loss in words: 4 as "gets 4", −3 as "sells 3"."""
    return f"{generator.choice(GAINS if change > 0 else LOSSES)} {abs(change)}"


def make_record(triple: Triple, generator: random.Random) -> Record:
    """Return the problem with these numbers in a wording drawn from `generator`."""
    start, first, second = triple
    answer = str(start + first + second)
    return Record(
        instruction=(
            f"{generator.choice(tuple(PEOPLE))} has {start} {generator.choice(OBJECTS)}, "
            f"{tell_change(first, generator)}, {tell_change(second, generator)}:"
        ),
        input="",
        output=answer,
        answer=answer,
    )


def draw_records(num_records: int, *, held_out: bool, seed: int) -> tuple[Record, ...]:
    """Return records whose triples and wordings are drawn at random: trained and held-out ones share no triple.

    While there are enough triples they are drawn without replacement; beyond that every triple occurs equally often,
    up to one.
    """
    generator = random.Random(f"{held_out} {seed}")
    triples = list_triples(held_out=held_out)
    rounds = -(-num_records // len(triples))
    drawn = [triple for _ in range(rounds) for triple in generator.sample(triples, len(triples))]
    return tuple(make_record(triple, generator) for triple in drawn[:num_records])
