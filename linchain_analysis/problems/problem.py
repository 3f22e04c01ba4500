"""What is learned: a base model, records to train and to ask, and how both become tokens and an accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linchain_analysis.problems.answers import AnswerForm
from linchain_analysis.problems.records import Record
from linchain_analysis.problems.templates import Template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED_LABEL = -100  # torch's cross-entropy leaves positions with this label out


@dataclass(frozen=True)
class ProblemDefaults:
    """How a problem is best trained and asked.

    Attributes:
        learning_rate: Peak learning rate of AdamW, the same for every method.
        num_steps: Optimiser steps.
        batch_size: Records of one step.
        num_eval: Number of held-out records.
        max_length: Tokens to which a training text is cut on its right.
    """

    learning_rate: float
    num_steps: int
    batch_size: int
    num_eval: int
    max_length: int


@dataclass(frozen=True)
class TextProblem:
    """Records to learn, and the base model that is to learn them.

    Attributes:
        name: Name of the problem, as runs carry it.
        model: Folder or hub name of the base model.
        train: Records to train on.
        evaluation: Held-out records; none of them is in `train`.
        target_modules: Last parts of the names of the layers to adapt.
        defaults: How it is best trained.
        template: Layout of the prompts.
        answer_form: How an answer is found in a response.
        trains_on_prompt: Whether the loss covers the prompt too.
    """

    name: str
    model: str
    train: Sequence[Record]
    evaluation: Sequence[Record]
    target_modules: tuple[str, ...]
    defaults: ProblemDefaults
    template: Template
    answer_form: AnswerForm
    trains_on_prompt: bool

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the base model in evaluation mode, a fresh copy at each call; in float32 unless told otherwise."""
        from linchain_analysis.problems.models import load_model

        return load_model(self.model, dtype)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base model's tokenizer; it has a padding token, the end token where the model has none."""
        from linchain_analysis.problems.models import load_tokenizer

        return load_tokenizer(self.model)

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """Return `input_ids`, `attention_mask` and `labels` of a record, each (tokens,), at most `max_length` long.

        The end token follows the response unless the text fills `max_length` without it. Labels equal the input ids
        and are −100 over the prompt unless it is trained on; a record cut before its response then has no label.
        """
        prompt = self.template.write_training_prompt(record)
        tokens = list(tokenizer(prompt + record.output).input_ids)[: self.defaults.max_length]
        end = tokenizer.eos_token_id
        if end is not None and len(tokens) < self.defaults.max_length and tokens[-1:] != [end]:
            tokens.append(end)
        num_ignored = 0 if self.trains_on_prompt else min(len(_encode_prompt(prompt, tokenizer)), len(tokens))
        return {
            "input_ids": tokens,
            "attention_mask": [1] * len(tokens),
            "labels": [IGNORED_LABEL] * num_ignored + tokens[num_ignored:],
        }

    def encode_question(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids (tokens,) of what the model is to complete."""
        return _encode_prompt(self.template.write_evaluation_prompt(record), tokenizer)

    def evaluate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record] | None = None,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """Return the `accuracy` of greedy answers to `records`, the held-out ones unless told otherwise.

        Draws no random number, and leaves every module of `model` in the mode in which it was.

        Raises:
            InputError: If there are no records to ask.
        """
        from linchain_analysis.problems.evaluation import answer_records

        asked = self.evaluation if records is None else records
        responses = answer_records(self, model, tokenizer, asked, batch_size)
        right = [
            self.answer_form.is_right(response, record.answer or record.output)
            for response, record in zip(responses, asked, strict=True)
        ]
        return {"accuracy": sum(right) / len(right)}


def _encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = list(tokenizer(prompt).input_ids)
    # Some tokenizers end every text with the end token, after which there is nothing to complete.
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
