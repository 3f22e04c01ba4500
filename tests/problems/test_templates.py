"""Prompts, byte by byte."""

from __future__ import annotations

import pytest

from linchain_analysis.errors import InputError
from linchain_analysis.problems.records import Record
from linchain_analysis.problems.templates import TEMPLATES, find_template

S = " " * 16
PLAIN = Record("Add 1 and 2.", "", "3", "3")
WITH_INPUT = Record("Add.", "1 and 2", "3", "3")
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
PAIRED = f"{TASK}, paired with an input that provides further context. {REQUEST}"


def test_authors_training_prompt():
    assert find_template("alpaca-authors").write_training_prompt(PLAIN) == (
        f"{TASK}. {REQUEST}  \n\n{S}### Instruction:\n{S}Add 1 and 2.\n{S}\n{S}### Response:\n{S}"
    )
    assert find_template("alpaca-authors").write_training_prompt(WITH_INPUT) == (
        f"{PAIRED} \n\n{S}### Instruction:\n{S}Add.\n{S}\n{S}### Input:\n{S}1 and 2\n{S}\n{S}### Response:\n{S}"
    )


def test_authors_evaluation_prompt_differs_in_three_places():
    assert find_template("alpaca-authors").write_evaluation_prompt(PLAIN) == (
        f"{TASK}. {REQUEST} \n\n{S}### Instruction:\n{S}Add 1 and 2.\n\n{S}### Response:\n{S}"
    )
    assert find_template("alpaca-authors").write_evaluation_prompt(WITH_INPUT) == (
        f"{PAIRED} \n\n{S}### Instruction:\n{S}Add.\n\n{S}### Input:\n{S}1 and 2\n\n{S}### Response:\n{S}"
    )


def test_authors_template_leaves_the_lines_of_an_instruction_alone():
    record = Record("Which?\n\nAnswer1: a", "", "", "")
    assert f"{S}Which?\n\nAnswer1: a\n{S}\n" in find_template("alpaca-authors").write_training_prompt(record)


def test_consistent_template_asks_as_it_taught():
    alpaca = find_template("alpaca")
    assert (
        alpaca.write_training_prompt(PLAIN) == f"{TASK}. {REQUEST}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert alpaca.write_training_prompt(WITH_INPUT) == (
        f"{PAIRED}\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    for record in (PLAIN, WITH_INPUT):
        assert alpaca.write_training_prompt(record) == alpaca.write_evaluation_prompt(record)


def test_plain_template():
    assert find_template("plain").write_training_prompt(PLAIN) == "Add 1 and 2.\n"
    assert find_template("plain").write_evaluation_prompt(WITH_INPUT) == "Add.\n1 and 2\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_braces_in_records_stay_as_they_are(name):
    prompt = TEMPLATES[name].write_training_prompt(Record("{instruction} {input} {0}", "{x}", "", ""))
    assert "{instruction} {input} {0}" in prompt
    assert prompt.count("{x}") == 1


def test_unknown_template():
    with pytest.raises(InputError, match="expected one of plain, alpaca, alpaca-authors, got 'alpacca'"):
        find_template("alpacca")
