"""Greedy answers of a model to records, without a trace left in the model or in a random stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from linchain_analysis.errors import InputError
from linchain_analysis.problems.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_analysis.problems.problem import TextProblem


def answer_records(
    problem: TextProblem,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    batch_size: int,
) -> list[str]:
    """Return the model's greedy response to each record, decoded without special tokens.

    A question that leaves too little of the model's context for the answer loses its beginning.

    Raises:
        InputError: If there is no record, or `batch_size` is not positive.
    """
    if not records:
        raise InputError("records", expected="at least one to ask", got="none", do="give held-out records")
    if batch_size < 1:
        raise InputError("batch_size", expected="at least 1", got=str(batch_size), do="give a positive number")
    num_new = problem.answer_form.max_new_tokens
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(context - num_new, 1) if context else None
    questions = [problem.encode_question(record, tokenizer) for record in records]
    if longest is not None:
        questions = [question[-longest:] for question in questions]
    return complete_prompts(model, tokenizer, questions, num_new, batch_size)


def complete_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Return the model's greedy completion of each prompt of token ids, decoded without special tokens."""
    # Prompts of about one length go together, so that little is spent on padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions = [""] * len(prompts)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = _complete(model, tokenizer, [prompts[index] for index in batch], max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                completions[index] = text
    return completions


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Hold every module of `model` in evaluation mode, and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _complete(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    # On the left, so that what is generated stands right behind every prompt.
    num_padded = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[tokenizer.pad_token_id] * n + list(p) for n, p in zip(num_padded, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(num_padded, prompts, strict=True)])
    device = next(model.parameters()).device
    generated = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    responses: list[str] = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return responses
