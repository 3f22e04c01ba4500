"""A Trainer that saves checkpoints, as a script: `python trainer_training.py NUM_STEPS CHECKPOINT|- [RUN]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import small_models
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from linchain_analysis import TrackerCallback, method_config


class Tokens(Dataset):
    """Rows of random tokens that a causal model is trained to repeat."""

    def __init__(self, size: int = 24) -> None:
        rows = small_models.batch("llama", seed=3, size=size)["input_ids"]
        self.rows = [{"input_ids": row, "labels": row} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def train(folder: Path, num_steps: int, checkpoint: Path | None, callbacks: list[Any], **arguments: Any) -> Trainer:
    """Train to `num_steps`, with a schedule for twelve, saving and evaluating every third step."""
    torch.manual_seed(1)
    settings = method_config("linchain-2-4", target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    trainer = Trainer(
        get_peft_model(small_models.llama(), settings),
        TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=num_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=7,
            data_seed=8,
            include_num_input_tokens_seen=True,
            **arguments,
        ),
        train_dataset=Tokens(),
        eval_dataset=Tokens(4),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


if __name__ == "__main__":
    steps, checkpoint, *run = sys.argv[1:]
    callbacks = [TrackerCallback(run[0], strict=True)] if run else []
    train(Path(), int(steps), None if checkpoint == "-" else Path(checkpoint), callbacks)
