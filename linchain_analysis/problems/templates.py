"""How a record becomes text: the prompt, and the response that follows it.

`alpaca` and `alpaca-authors` hold the same words. The second reproduces the text that the authors of LLM-Adapters,
MoSLoRA and LinChain trained and evaluated on, byte by byte: the indentation of their source code is part of it, and
the prompt that is evaluated is not the one that was trained. `alpaca`, the default, has no indentation and one prompt
for both, so that a model is asked in the words in which it was taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from linchain_analysis.errors import InputError
from linchain_analysis.problems.records import Record


@dataclass(frozen=True)
class Template:
    """The prompts of one layout, each with the places {instruction} and, where it has one, {input}.

    Attributes:
        name: What `--template` calls it.
        training: Prompt in training, for a record without input.
        training_with_input: The same for a record with one.
        evaluation: Prompt in generation, for a record without input.
        evaluation_with_input: The same for a record with one.
    """

    name: str
    training: str
    training_with_input: str
    evaluation: str
    evaluation_with_input: str

    def write_training_prompt(self, record: Record) -> str:
        """Return what stands before the response in training."""
        return _fill(self.training_with_input if record.input else self.training, record)

    def write_evaluation_prompt(self, record: Record) -> str:
        """Return what the model is to complete."""
        return _fill(self.evaluation_with_input if record.input else self.evaluation, record)


def find_template(name: str) -> Template:
    """Return the template of this name.

    Raises:
        InputError: If there is none.
    """
    if name not in TEMPLATES:
        raise InputError("template", expected=f"one of {', '.join(TEMPLATES)}", got=repr(name), do="choose one of them")
    return TEMPLATES[name]


def _fill(prompt: str, record: Record) -> str:
    # Not str.format: what a record says may hold braces, and an instruction may hold the text "{input}".
    head, _, tail = prompt.partition("{instruction}")
    return head + record.instruction + tail.replace("{input}", record.input)


_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INDENT = " " * 16


def _lay_out(head: str, *lines: str) -> str:
    return "\n".join((head, "", *lines))


_CONSISTENT = _lay_out(_TASK, "### Instruction:", "{instruction}", "", "### Response:", "")
_CONSISTENT_WITH_INPUT = _lay_out(
    _TASK_WITH_INPUT, "### Instruction:", "{instruction}", "", "### Input:", "{input}", "", "### Response:", ""
)


def _indent(*lines: str) -> tuple[str, ...]:
    return tuple(_INDENT + line for line in lines)


_INPUT_LINES = ("### Input:", "{input}")

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        template.name: template
        for template in (
            Template(
                "plain", "{instruction}\n", "{instruction}\n{input}\n", "{instruction}\n", "{instruction}\n{input}\n"
            ),
            Template("alpaca", _CONSISTENT, _CONSISTENT_WITH_INPUT, _CONSISTENT, _CONSISTENT_WITH_INPUT),
            Template(
                "alpaca-authors",
                training=_lay_out(f"{_TASK}  ", *_indent("### Instruction:", "{instruction}", "", "### Response:", "")),
                training_with_input=_lay_out(
                    f"{_TASK_WITH_INPUT} ",
                    *_indent("### Instruction:", "{instruction}", "", *_INPUT_LINES, "", "### Response:", ""),
                ),
                evaluation=_lay_out(
                    f"{_TASK} ",
                    *_indent("### Instruction:", "{instruction}"),
                    "",
                    *_indent("### Response:", ""),
                ),
                evaluation_with_input=_lay_out(
                    f"{_TASK_WITH_INPUT} ",
                    *_indent("### Instruction:", "{instruction}"),
                    "",
                    *_indent(*_INPUT_LINES),
                    "",
                    *_indent("### Response:", ""),
                ),
            ),
        )
    }
)
