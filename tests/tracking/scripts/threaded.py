"""A training in a thread that goes on after the script's last line."""

import threading

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
ended = threading.Event()
model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train():
    for step in range(4):
        if step == 2:
            ended.wait(1)
        loss = model(torch.ones(1, 6)).square().sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step loss={loss.item()!r} grad_norm={norm.item()!r} learning_rate=0.1", flush=True)


threading.Thread(target=train).start()
