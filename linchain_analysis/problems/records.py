"""Records of a text problem and the JSON files that hold them (the LLM-Adapters schema)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linchain_analysis.errors import InputError

_REQUIRED = ("instruction", "output")
_OPTIONAL = ("input", "answer")


@dataclass(frozen=True)
class Record:
    """One exercise.

    Attributes:
        instruction: What is asked.
        input: Further context; empty in all of the LLM-Adapters files.
        output: The response that is trained on.
        answer: What an answer is compared with; empty where only `output` is known.
    """

    instruction: str
    input: str
    output: str
    answer: str


def read_records(path: str | Path) -> tuple[Record, ...]:
    """Read a JSON array of objects with `instruction` and `output`, and `input` and `answer` where they are given.

    Raises:
        InputError: If the file is missing, is not such an array, or is empty; a faulty record is named by its index.
    """
    path = Path(path)
    form = "a JSON array of records with the keys instruction and output"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise InputError(
            f"data {path}", expected="a readable file", got=fault.strerror or str(fault), do="check the path"
        ) from fault
    except UnicodeDecodeError as fault:
        raise InputError(f"data {path}", expected="UTF-8 text", got=str(fault), do="save the file as UTF-8") from fault
    except json.JSONDecodeError as fault:
        raise InputError(
            f"data {path}", expected=form, got=f"text that is not JSON ({fault})", do="write the records as one array"
        ) from fault
    if not isinstance(content, list):
        raise InputError(f"data {path}", expected=form, got=f"a JSON {_name_type(content)}", do="put it in an array")
    if not content:
        raise InputError(f"data {path}", expected="at least one record", got="an empty array", do="add records")
    return tuple(_read_record(entry, f"data {path}, record {index}") for index, entry in enumerate(content))


def split_records(
    records: Sequence[Record], *, num_held_out: int, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Divide records into trained and held-out ones, in their original order, drawn from `seed` alone.

    Records that ask the same (equal instruction and input) stay on one side, so that nothing held out is trained on;
    the held-out side may therefore exceed `num_held_out` by the repetitions of its last question.

    Raises:
        InputError: If a side would be empty.
    """
    questions = list(dict.fromkeys((record.instruction, record.input) for record in records))
    counts = dict.fromkeys(questions, 0)
    for record in records:
        counts[record.instruction, record.input] += 1
    random.Random(seed).shuffle(questions)
    held_out: set[tuple[str, str]] = set()
    num_drawn = 0
    for question in questions:
        if num_drawn >= num_held_out:
            break
        held_out.add(question)
        num_drawn += counts[question]
    if not 0 < num_drawn < len(records):
        raise InputError(
            "num_eval",
            expected=f"at least 1 and few enough of {len(records)} records ({len(questions)} different ones) to train",
            got=str(num_held_out),
            do="hold out fewer or give more records",
        )
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[(record.instruction, record.input) in held_out].append(record)
    return tuple(sides[0]), tuple(sides[1])


def _read_record(entry: Any, place: str) -> Record:
    if not isinstance(entry, dict):
        raise InputError(place, expected="a JSON object", got=f"a JSON {_name_type(entry)}", do="make it an object")
    missing = [key for key in _REQUIRED if key not in entry]
    if missing:
        raise InputError(
            place,
            expected=f"the keys {' and '.join(_REQUIRED)}",
            got=f"no {' and no '.join(missing)} among {sorted(entry)}",
            do="add what is missing",
        )
    values = {key: entry.get(key, "") for key in (*_REQUIRED, *_OPTIONAL)}
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(
                f"{place}, {key}", expected="a string", got=f"a JSON {_name_type(value)}", do="write it in quotes"
            )
    return Record(**values)


def _name_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
