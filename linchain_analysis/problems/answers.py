"""From a response to an answer, and whether it is right: the extraction rules of each family of data sets.

The rules are those of the evaluation code of LLM-Adapters, which LinChain and MoSLoRA use unchanged, so that
accuracies can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NUMBER_TOLERANCE = 1e-3  # absolute, as in the authors' code

Kind = Literal["choice", "number", "exact"]


@dataclass(frozen=True)
class AnswerForm:
    """What answers look like and how one is found in a response.

    Attributes:
        kind: `choice`: the first match of `pattern`; `number`: the last number, commas removed; `exact`: the whole
            response without surrounding white space.
        pattern: Regular expression of a choice, case-sensitive.
        max_new_tokens: Tokens to generate for it.
    """

    kind: Kind
    pattern: str = ""
    max_new_tokens: int = 32

    def extract(self, response: str) -> str:
        """Return the answer that a response gives, empty where it gives none."""
        if self.kind == "choice":
            found = re.search(self.pattern, response)
            return found.group(0) if found else ""
        if self.kind == "number":
            numbers = re.findall(r"-?\d+\.?\d*", response.replace(",", ""))
            return numbers[-1] if numbers else ""
        return response.strip()

    def is_right(self, response: str, reference: str) -> bool:
        """Return whether a response gives the answer `reference`; one that gives none is wrong."""
        answer = self.extract(response)
        if self.kind == "number":
            expected = _read_number(reference)
            if expected is not None:
                return answer != "" and abs(float(answer) - expected) <= NUMBER_TOLERANCE
            return answer == reference.strip()
        return answer != "" and answer == reference.strip()


def _choice(*choices: str) -> AnswerForm:
    return AnswerForm("choice", "|".join(choices))


_ANSWERS = _choice(*(f"answer{number}" for number in range(1, 6)))
_NUMBER = AnswerForm("number", max_new_tokens=256)
_LETTER = AnswerForm(
    "choice", "A|B|C|D|E", max_new_tokens=256
)  # no word boundary: "Because" says B, as for the authors
EXACT = AnswerForm("exact")

# By data set, in lower case: the authors spell the same set differently in different places.
FORMS: Mapping[str, AnswerForm] = MappingProxyType(
    {
        "boolq": _choice("true", "false"),
        "piqa": _choice("solution1", "solution2"),
        "social_i_qa": _ANSWERS,
        "arc-easy": _ANSWERS,
        "arc-challenge": _ANSWERS,
        "openbookqa": _ANSWERS,
        "hellaswag": _choice(*(f"ending{number}" for number in range(1, 5))),
        "winogrande": _choice("option1", "option2"),
        "aqua": _LETTER,
        "gsm8k": _NUMBER,
        "svamp": _NUMBER,
        "addsub": _NUMBER,
        "multiarith": _NUMBER,
        "singleeq": _NUMBER,
        "mawps": _NUMBER,
    }
)


def find_form(name: str, references: Iterable[str]) -> AnswerForm:
    """Return the form of answers of the data set `name`; of an unknown one, the form that all `references` have.

    A set whose answers have no form in common, or none at all, is compared exactly.
    """
    if name.lower() in FORMS:
        return FORMS[name.lower()]
    distinct = {reference.strip() for reference in references}
    if not distinct:
        return EXACT
    for form in dict.fromkeys(FORMS.values()):
        if form.kind == "choice" and all(re.fullmatch(form.pattern, reference) for reference in distinct):
            return form
    return _NUMBER if all(_read_number(reference) is not None for reference in distinct) else EXACT


def _read_number(text: str) -> float | None:
    text = text.strip().replace(",", "")
    return float(text) if re.fullmatch(r"-?\d+\.?\d*", text) else None
