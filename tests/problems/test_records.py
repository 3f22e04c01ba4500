"""Files of records: what is read, what is refused, and how they are divided."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_analysis.errors import InputError
from linchain_analysis.problems.records import Record, read_records, split_records


def test_optional_keys_are_empty_and_others_are_left_out(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"instruction": "é?", "output": "b", "more": 1}]), encoding="utf-8")
    assert read_records(path) == (Record("é?", "", "b", ""),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction,output", "got text that is not JSON \\(Expecting value: line 1 column 1"),
        ('{"instruction": "a"}', "got a JSON object"),
        ("[]", "expected at least one record, got an empty array"),
        ('[{"instruction": "a", "output": "b"}, 3]', "record 1: expected a JSON object, got a JSON number"),
        ('[{"instruction": "a", "output": "b"}, {"input": "c"}]', "record 1: .* got no instruction and no output"),
        ('[{"instruction": "a", "output": 5}]', "record 0, output: expected a string, got a JSON number"),
        ('[{"instruction": "a", "output": null}]', "record 0, output: expected a string, got a JSON null"),
    ],
)
def test_faulty_files_are_refused_by_place(tmp_path, text, message):
    path = tmp_path / "faulty.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="got No such file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(InputError, match="got Is a directory"):
        read_records(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'[{"instruction": "\xe9", "output": ""}]')
    with pytest.raises(InputError, match="expected UTF-8 text"):
        read_records(tmp_path / "latin.json")


RECORDS = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30).filter(lambda names: len(set(names)) > 1)


@given(RECORDS, st.integers(0, 5))
def test_no_question_is_on_both_sides_and_none_is_lost(names, seed):
    records = [Record(name, "", str(index), "") for index, name in enumerate(names)]
    train, held_out = split_records(records, num_held_out=1, seed=seed)
    assert not {record.instruction for record in train} & {record.instruction for record in held_out}
    assert sorted(train + held_out, key=lambda record: int(record.output)) == records
    assert list(train) == [record for record in records if record in train]
    assert (train, held_out) == split_records(records, num_held_out=1, seed=seed)


def test_seed_decides_what_is_held_out():
    records = [Record(str(index), "", "", "") for index in range(100)]
    sides = {split_records(records, num_held_out=10, seed=seed)[1] for seed in range(5)}
    assert len(sides) == 5
    assert all(len(side) == 10 for side in sides)


@pytest.mark.parametrize("num_held_out", [0, 3, 100])
def test_neither_side_may_be_empty(num_held_out):
    records = [Record(str(index), "", "", "") for index in range(3)]
    with pytest.raises(InputError, match=f"of 3 records .3 different ones. to train, got {num_held_out};"):
        split_records(records, num_held_out=num_held_out, seed=0)
