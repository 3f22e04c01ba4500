"""Data for an audit: records or lines of text as fixed batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linchain_analysis.auditing.saved import SavedAdapter
from linchain_analysis.errors import InputError, UnsupportedError
from linchain_analysis.problems.answers import AnswerForm
from linchain_analysis.problems.models import load_context_length, load_tokenizer
from linchain_analysis.problems.problem import IGNORED_LABEL, ProblemDefaults, TextProblem
from linchain_analysis.problems.records import Record, read_records
from linchain_analysis.problems.templates import find_template

Batch = dict[str, torch.Tensor]
MAX_LENGTH = 256


def require_causal(adapter: SavedAdapter) -> None:
    """Refuse an adapter whose loss on text is not that of a causal language model.

    Raises:
        UnsupportedError: It is for another task.
    """
    task = adapter.config.get("task_type")
    mapped = str((adapter.config.get("auto_mapping") or {}).get("base_model_class", ""))
    if task != "CAUSAL_LM" and not (task is None and mapped.endswith(("ForCausalLM", "LMHeadModel"))):
        raise UnsupportedError(
            f"{adapter.name}, --data",
            expected="an adapter of a causal language model",
            got=f"task_type {task}, model class {mapped or 'unknown'}",
            do="audit it without --data",
        )


def load_batches(
    data: Path, model: str, *, template: str | None = None, num_records: int | None = None, batch_size: int = 16
) -> list[Batch]:
    """Return the data as batches of `input_ids`, `attention_mask` and `labels`, each int64 (texts, tokens).

    Args:
        data: JSON file of records with `instruction` and `output`, or a text file with one text a line.
        model: Folder or hub name of the base model, whose tokenizer is used.
        template: Layout of the prompts of records; alpaca unless told otherwise.
        num_records: How many to take, from the first; all unless told otherwise.
        batch_size: Texts of one batch.

    Raises:
        InputError: The file cannot be read or holds nothing.
    """
    if data.suffix.lower() == ".json":
        records, layout = read_records(data), template or "alpaca"
    else:
        records, layout = _read_lines(data), "plain"
    context = load_context_length(model) or MAX_LENGTH
    problem = TextProblem(
        name=data.stem,
        model=model,
        train=(),
        evaluation=records,
        target_modules=(),
        defaults=ProblemDefaults(0.0, 0, batch_size, len(records), min(MAX_LENGTH, context)),
        template=find_template(layout),
        answer_form=AnswerForm("exact", max_new_tokens=1),
        trains_on_prompt=True,
    )
    tokenizer = load_tokenizer(model)
    encoded = [_encode(problem, record, tokenizer) for record in records[:num_records]]
    return [_collate(encoded[i : i + batch_size], tokenizer.pad_token_id) for i in range(0, len(encoded), batch_size)]


def num_predicted(batch: Batch) -> int:
    """Return how many tokens of a batch the loss is the mean over."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def _read_lines(path: Path) -> tuple[Record, ...]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--data {path}", expected="a JSON file of records or a text file", got=str(error), do="check the path"
        ) from error
    if not lines:
        raise InputError(f"--data {path}", expected="at least one line of text", got="none", do="add text")
    return tuple(Record(instruction="", input="", output=line, answer="") for line in lines)


def _encode(problem: TextProblem, record: Record, tokenizer: Any) -> dict[str, list[int]]:
    if record.instruction:
        return problem.encode(record, tokenizer)
    tokens = list(tokenizer(record.output).input_ids)[: problem.defaults.max_length]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": list(tokens)}


def _collate(examples: Sequence[dict[str, list[int]]], pad: int) -> Batch:
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED_LABEL}
    return {
        name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])
        for name, value in fill.items()
    }
