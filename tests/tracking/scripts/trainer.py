"""transformers' Trainer on a tiny causal model, with most of what people switch on."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

set_seed(0)


class Tokens(Dataset):
    def __init__(self, size):
        self.rows = torch.randint(0, 48, (size, 8))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Printer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            print(
                f"step loss={logs['loss']!r} grad_norm={logs['grad_norm']!r} epoch={state.epoch!r} "
                f"tokens={state.num_input_tokens_seen!r}"
            )
        elif "eval_loss" in logs:
            print(f"eval step={state.global_step} loss={logs['eval_loss']!r}")

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        print(f"rate learning_rate={optimizer.param_groups[0]['lr']!r}")


config = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=sys.argv[1],
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_grad_norm=0.01,
        learning_rate=1e-2,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        include_num_input_tokens_seen="all",
        seed=7,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    ),
    train_dataset=Tokens(24),
    eval_dataset=Tokens(4),
    callbacks=[Printer()],
)
trainer.evaluate()
trainer.train()
trainer.evaluate()
