"""From records to batches: encoded once, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from linchain_analysis.problems import Record, TextProblem
from linchain_analysis.problems.problem import IGNORED_LABEL

Example = dict[str, torch.Tensor]


class EncodedRecords(Dataset[Example]):
    """Records as token ids, each encoded when first asked for and kept: a short run never sees most of them."""

    def __init__(self, problem: TextProblem, records: Sequence[Record], tokenizer: Any) -> None:
        self._problem = problem
        self._records = records
        self._tokenizer = tokenizer
        self._encoded: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """Return `input_ids`, `attention_mask` and `labels` of one record, int64, each (tokens,)."""
        if index not in self._encoded:
            encoded: Mapping[str, Any] = self._problem.encode(self._records[index], self._tokenizer)
            self._encoded[index] = {
                name: torch.as_tensor(encoded[name], dtype=torch.int64)
                for name in ("input_ids", "attention_mask", "labels")
            }
        return self._encoded[index]


def collate(examples: Sequence[Example], *, pad_token_id: int) -> Example:
    """Return examples as one batch, int64, each tensor (examples, tokens of the longest).

    Padding stands on the right: positions then start at 0 for every record, and a causal model's outputs do not
    depend on it. Padded positions are masked and have no label.
    """
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
    return {
        name: pad_sequence([example[name] for example in examples], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
