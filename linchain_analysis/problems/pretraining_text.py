"""The text on which the built-in model is pretrained: numbers, sums and one-step stories, generated on the fly.

It holds every ingredient of the built-in problem (`sums`) and not the problem: the people, things and verbs occur in
stories of one step, sums of two steps only as bare figures and verbs, no question is ever asked, and the number
triples that the problem holds out occur nowhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from linchain_analysis.problems.sums import LARGEST, OBJECTS, PEOPLE, Triple, list_triples, tell_change

_DIGIT_NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEEN_NAMES = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
NUMBER_NAMES = (
    *("zero", *_DIGIT_NAMES, "ten", *_TEEN_NAMES),
    "twenty",
)

# A document is a prompt and what completes it, which is what an accuracy can be measured on.
Document = tuple[str, str]


def count_on(generator: random.Random) -> Document:
    """Return consecutive numbers, upwards or downwards: "5 6 7 8", "9"."""
    first, step = generator.randint(4, LARGEST - 4), generator.choice((1, -1))
    return " ".join(str(first + step * index) for index in range(4)) + " ", str(first + step * 4)


def name_number(generator: random.Random) -> Document:
    """Return a number's name after its figures or its figures after its name."""
    number = generator.randint(0, LARGEST)
    names = (str(number), NUMBER_NAMES[number])
    return (f"{names[0]} is ", names[1]) if generator.random() < 0.5 else (f"{names[1]} is ", names[0])


def add_in_figures(generator: random.Random) -> Document:
    """Return a sum of one step in figures: "8 + 4 = ", "12"."""
    start, change = _draw_step(generator)
    return f"{_write_sum(start, change)} = ", str(start + change)


def add_in_words(generator: random.Random) -> Document:
    """Return a sum of one step in words: "eight plus four is ", "twelve"."""
    start, change = _draw_step(generator)
    word = "plus" if change > 0 else "minus"
    return f"{NUMBER_NAMES[start]} {word} {NUMBER_NAMES[abs(change)]} is ", NUMBER_NAMES[start + change]


def add_twice_in_figures(generator: random.Random) -> Document:
    """Return a sum of two steps in figures, of no held-out triple: "8 + 4 - 3 = ", "9"."""
    return write_figures(generator.choice(list_triples(held_out=False)), generator)


def add_twice_in_verbs(generator: random.Random) -> Document:
    """Return a sum of two steps in verbs, of no held-out triple: "8 gets 4 loses 3: ", "9"."""
    return write_verbs(generator.choice(list_triples(held_out=False)), generator)


def tell_step(generator: random.Random) -> Document:
    """Return a story of one step with its end: "Tom has 8 figs. He gets 4. Now he has ", "12 figs."."""
    start, change = _draw_step(generator)
    name, pronoun = generator.choice(tuple(PEOPLE.items()))
    thing = generator.choice(OBJECTS)
    story = f"{name} has {start} {thing}. {pronoun} {tell_change(change, generator)}. Now {pronoun.lower()} has "
    return story, f"{start + change} {thing}."


def write_story_as_sum(generator: random.Random) -> Document:
    """Return a story of one step and its sum: "Tom has 8 figs. He gets 4. So ", "8 + 4 = 12"."""
    start, change = _draw_step(generator)
    name, pronoun = generator.choice(tuple(PEOPLE.items()))
    story = f"{name} has {start} {generator.choice(OBJECTS)}. {pronoun} {tell_change(change, generator)}. So "
    return story, f"{_write_sum(start, change)} = {start + change}"


# The share of documents of each kind.
MIXTURE: Mapping[Callable[[random.Random], Document], float] = {
    count_on: 0.05,
    name_number: 0.05,
    add_in_figures: 0.15,
    add_in_words: 0.05,
    add_twice_in_figures: 0.30,
    add_twice_in_verbs: 0.20,
    tell_step: 0.15,
    write_story_as_sum: 0.05,
}


def draw_documents(generator: random.Random) -> Iterator[Document]:
    """Yield documents of the mixture without end."""
    kinds, shares = list(MIXTURE), list(MIXTURE.values())
    while True:
        (kind,) = generator.choices(kinds, shares)
        yield kind(generator)


def write_figures(triple: Triple, generator: random.Random) -> Document:
    """Return the sum of these numbers in figures."""
    return f"{_write_sum(*triple)} = ", str(sum(triple))


def write_verbs(triple: Triple, generator: random.Random) -> Document:
    """Return the sum of these numbers in verbs."""
    start, first, second = triple
    return f"{start} {tell_change(first, generator)} {tell_change(second, generator)}: ", str(sum(triple))


TWO_STEP_WRITERS = (write_figures, write_verbs)


def _draw_step(generator: random.Random) -> tuple[int, int]:
    while True:
        start, change = generator.randint(0, LARGEST), generator.choice((1, -1)) * generator.randint(1, 9)
        if 0 <= start + change <= LARGEST:
            return start, change


def _write_sum(start: int, *changes: int) -> str:
    return " ".join((str(start), *(f"{'+' if change > 0 else '-'} {abs(change)}" for change in changes)))
