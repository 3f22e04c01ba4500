"""From responses to answers, with the quirks of the authors' rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.problems.answers import EXACT, FORMS, find_form


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("ARC-Easy", "the correct answer is answer3", "answer3"),
        ("ARC-Challenge", "not answer2 but answer1", "answer2"),
        ("openbookqa", "Answer3", ""),
        ("social_i_qa", "answer6", ""),
        ("piqa", "solution2.", "solution2"),
        ("winogrande", "option1/option2", "option1"),
        ("hellaswag", "ending4 answer1", "ending4"),
        ("boolq", "untrue", "true"),
        ("gsm8k", "2 and 2 make 1,234.50 dollars", "1234.50"),
        ("gsm8k", "The answer is 5.", "5."),
        ("SVAMP", "6 - -3", "-3"),
        ("AddSub", "none", ""),
        ("AQuA", "Because (D)", "B"),
        ("AQuA", "the answer is d", ""),
        ("unknown", "  twelve \n", "twelve"),
    ],
)
def test_extraction_by_hand(name, response, answer):
    assert find_form(name, ["word"]).extract(response) == answer


@pytest.mark.parametrize(
    ("name", "response", "reference", "right"),
    [
        ("gsm8k", "The answer is 576", "576.0", True),
        ("gsm8k", "0.667", "0.6666666666666666", True),
        ("gsm8k", "0.668", "0.6666666666666666", False),
        ("gsm8k", "nothing", "0", False),
        ("ARC-Easy", "answer1", "answer1", True),
        ("ARC-Easy", "", "", False),
        ("unknown", "9", "9", True),
        ("unknown", "9 ", "9", True),
        ("unknown", "", "", False),
    ],
)
def test_rightness_by_hand(name, response, reference, right):
    assert find_form(name, ["word"]).is_right(response, reference) is right


@pytest.mark.parametrize(
    ("references", "known"),
    [
        (["answer1", "answer4"], "arc-easy"),
        (["option2"], "winogrande"),
        (["true", "false"], "boolq"),
        (["A", "E"], "aqua"),
        (["1", "-2.5", "1,000"], "gsm8k"),
    ],
)
def test_form_of_an_unknown_set_is_what_its_answers_share(references, known):
    assert find_form("mine", references) == FORMS[known]


@pytest.mark.parametrize("references", [[], ["answer1", "option1"], ["1", "one"], ["F"]])
def test_answers_without_a_common_form_are_compared_exactly(references):
    assert find_form("mine", references) == EXACT


def test_known_name_wins_over_the_answers_and_ignores_case():
    assert find_form("ARC-EASY", ["1", "2"]) == FORMS["arc-easy"]


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc $!\n", max_size=20))
def test_last_number_is_found_in_any_words(number, words):
    form = FORMS["gsm8k"]
    assert form.is_right(f"7 {words} {number:,} {words}", str(number))
    assert not form.is_right(f"{number} {words} {number + 1}", str(number))


@given(st.text(), st.sampled_from(sorted(FORMS)))
def test_what_is_extracted_from_an_answer_is_that_answer(response, name):
    answer = FORMS[name].extract(response)
    assert answer == "" or FORMS[name].extract(answer) == answer
