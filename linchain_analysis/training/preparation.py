"""What runs of one problem have in common, loaded once: records, tokenizer, base accuracy."""

from __future__ import annotations

from typing import Any

import torch

from linchain_analysis.problems import TextProblem, load_problem
from linchain_analysis.training.batches import EncodedRecords
from linchain_analysis.training.settings import FinetuneSettings


class PreparedProblem:
    """A problem with its records encoded, which many runs share. The model is not shared: each run trains a fresh one.

    Attributes:
        problem: The problem.
        tokenizer: Its tokenizer.
        train: Encoded training records.
        evaluation: Encoded held-out records.
        pad_token_id: Token that fills up a batch.
    """

    def __init__(self, problem: TextProblem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.tokenizer: Any = problem.load_tokenizer()
        self.train = EncodedRecords(problem, problem.train, self.tokenizer)
        self.evaluation = EncodedRecords(problem, problem.evaluation, self.tokenizer)
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self._dtype = dtype
        self._base_accuracy: float | None = None

    def load_model(self) -> Any:
        """Return the base model, fresh from its file, on the accelerator where there is one."""
        model = self.problem.load_model(self._dtype)
        return model.to("cuda") if torch.cuda.is_available() else model

    def measure_accuracy(self, model: Any) -> float:
        """Return the share of held-out records that `model` answers right, by generation."""
        return float(self.problem.evaluate(model, self.tokenizer)["accuracy"])

    def measure_base_accuracy(self, base: Any) -> float:
        """Return the accuracy of the base model, measured on `base` at the first call and remembered."""
        if self._base_accuracy is None:
            self._base_accuracy = self.measure_accuracy(base)
        return self._base_accuracy


def find_problem(settings: FinetuneSettings) -> TextProblem:
    """Return the problem that `settings` name, its model not yet loaded.

    The records are the same for every seed, so that seeds differ in what `data_seed` says (order and dropout) and
    not in the question asked.

    Raises:
        InputError: If there is no such problem, data file or model, or the model is none for text.
    """
    return load_problem(
        settings.problem or "sums",
        model=settings.model,
        data=settings.data,
        num_eval=settings.num_eval,
        template=settings.template,
    )


def prepare(settings: FinetuneSettings) -> PreparedProblem:
    """Return the problem that `settings` name, ready to train on."""
    return PreparedProblem(find_problem(settings), torch.bfloat16 if settings.bf16 else torch.float32)
