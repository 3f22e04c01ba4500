"""Scripts that track themselves: a Trainer with TrackerCallback, and a raw loop with Tracker."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from linchain_analysis import Tracker, TrackerCallback

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=48,
)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 48, (8, 6))]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=sys.argv[1], max_steps=3, report_to=[], use_cpu=True, disable_tqdm=False, save_strategy="no"
    ),
    train_dataset=rows,
    callbacks=[TrackerCallback(sys.argv[2])],
)
trainer.train()

net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
with Tracker(net, optimizer, sys.argv[3]):
    for _ in range(2):
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
