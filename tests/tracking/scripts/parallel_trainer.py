"""A Trainer on however many processes, with the same global batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import small_models

from linchain_analysis import LinChainConfig, TrackerCallback

options = dict(pair.split("=", 1) for pair in sys.argv[1:])
set_seed(0)
config = LinChainConfig(r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"])
model = get_peft_model(small_models.llama(), config)
tokens = torch.randint(3, small_models.VOCABULARY, (64, 10), generator=torch.Generator().manual_seed(3))
arguments = TrainingArguments(
    options["out"],
    per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
    gradient_accumulation_steps=2,
    max_steps=4,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    max_grad_norm=0.05,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    save_strategy="no",
    disable_tqdm=True,
    train_sampling_strategy="sequential",
    ddp_find_unused_parameters=False,
)
callbacks = [TrackerCallback(options["tracker"])] if "tracker" in options else []
data = [{"input_ids": row, "labels": row} for row in tokens]
Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
