"""The built-in problem: right answers, and nothing held out that could have been remembered."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from linchain_analysis.problems.pretraining_text import MIXTURE, NUMBER_NAMES, draw_documents
from linchain_analysis.problems.records import Record
from linchain_analysis.problems.sums import (
    GAINS,
    LARGEST,
    LOSSES,
    draw_records,
    is_held_out,
    list_triples,
    make_record,
)

SIGNS = {**dict.fromkeys((*GAINS, "+", "plus"), 1), **dict.fromkeys((*LOSSES, "-", "minus"), -1)}


def read_triple(text: str) -> tuple[int, ...]:
    """Read the numbers of a problem with their signs from its words alone."""
    start = int(re.search(r"\d+", text).group())
    return start, *(SIGNS[verb] * int(size) for verb, size in re.findall(r"([a-z+-]+) (\d+)", text) if verb in SIGNS)


def test_first_problem_by_hand():
    assert read_triple("Tom has 8 figs, gets 4, loses 3:") == (8, 4, -3)
    record = make_record((8, 4, -3), random.Random(0))
    assert read_triple(record.instruction) == (8, 4, -3)
    assert record == Record(record.instruction, "", "9", "9")


def test_every_answer_follows_from_its_words():
    for record in draw_records(2000, held_out=False, seed=3) + draw_records(500, held_out=True, seed=3):
        start, first, second = read_triple(record.instruction)
        assert record.answer == record.output == str(start + first + second)
        assert 0 <= start + first <= LARGEST
        assert 0 <= start + first + second <= LARGEST


def test_held_out_numbers_are_never_trained_on_whatever_the_seeds():
    asked = {
        read_triple(record.instruction) for seed in range(4) for record in draw_records(400, held_out=True, seed=seed)
    }
    trained = {
        read_triple(record.instruction) for seed in range(4) for record in draw_records(4000, held_out=False, seed=seed)
    }
    assert asked and trained
    assert not asked & trained
    assert all(map(is_held_out, asked))


def test_held_out_numbers_are_the_same_for_ever():
    # Changing this division would let the shipped model meet at a test what it was pretrained on.
    assert (len(list_triples(held_out=True)), len(list_triples(held_out=False))) == (494, 2065)
    assert list_triples(held_out=True)[:3] == PINNED


PINNED = ((1, 1, 4), (1, 1, 7), (1, -1, 2))


def test_pretraining_text_holds_no_held_out_numbers_and_no_question():
    generator = random.Random(11)
    documents = draw_documents(generator)
    asked = re.compile(r"has \d+ \w+, ")  # the beginning of every question
    assert all(asked.search(record.instruction) for record in draw_records(50, held_out=False, seed=0))
    num_two_step = 0
    for _ in range(20_000):
        prompt, completion = next(documents)
        assert not asked.search(prompt + completion)
        numbers = read_triple(prompt) if re.search(r"\d+ [a-z+-]", prompt) else ()
        if len(numbers) == 3:
            num_two_step += 1
            assert not is_held_out(numbers)
            assert completion.split()[0] == str(sum(numbers))
    assert num_two_step > 8_000


@pytest.mark.parametrize("kind", MIXTURE, ids=lambda kind: kind.__name__)
def test_pretraining_documents_are_true(kind):
    values = {name: value for value, name in enumerate(NUMBER_NAMES)}
    generator = random.Random(5)
    for _ in range(300):
        prompt, completion = kind(generator)
        words = re.findall(r"[A-Za-z]+|\d+|[^\s\w]", prompt + completion)
        text = " ".join(str(values.get(word, word)) for word in words)
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        assert max(numbers) <= LARGEST
        if kind.__name__ == "count_on":
            assert {after - before for before, after in itertools.pairwise(numbers)} in ({1}, {-1})
        elif kind.__name__ == "name_number":
            assert numbers[0] == numbers[1]
        else:
            story = text.split(" . So ")[0]  # a story may be followed by its own sum
            expression = read_triple(story)
            assert sum(expression) == numbers[-1]


def test_mixture_is_whole():
    assert sum(MIXTURE.values()) == pytest.approx(1, abs=1e-12)


def test_records_are_drawn_from_the_seed_alone():
    assert draw_records(50, held_out=True, seed=1) == draw_records(50, held_out=True, seed=1)
    assert draw_records(50, held_out=True, seed=1) != draw_records(50, held_out=True, seed=2)
    assert draw_records(0, held_out=True, seed=1) == ()


def test_no_triple_repeats_before_all_have_come():
    triples = [read_triple(record.instruction) for record in draw_records(494 + 10, held_out=True, seed=0)]
    assert len(set(triples[:494])) == 494
    assert len(set(triples[494:])) == 10
