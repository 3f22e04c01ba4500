"""Scripts in which there is nothing to track: python no_adapter.py whole|frozen|idle."""

import sys

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
if sys.argv[1] != "whole":
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], inference_mode=True))
    with torch.inference_mode():
        print(model(torch.ones(1, 6)).tolist())
if sys.argv[1] in ("whole", "idle"):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3 if sys.argv[1] == "whole" else 0):
    optimizer.zero_grad()
    loss = model(torch.ones(1, 6)).square().sum()
    loss.backward()
    optimizer.step()
    print(loss.item())
print("peft" in sys.modules)
