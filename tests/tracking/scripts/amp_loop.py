"""A float16 loop with a gradient scaler, accumulation and clipping, as in PyTorch's own recipe."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

ACCUMULATION = 2
torch.manual_seed(0)

model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
scaler = torch.GradScaler(device="cpu", init_scale=2.0**20)  # too large: it backs off in the first steps
data = [(torch.randn(8, 16), torch.randn(8, 4)) for _ in range(8 * ACCUMULATION)]

optimizer.zero_grad(set_to_none=True)
running_loss = 0.0
for i, (x, y) in enumerate(data, start=1):
    with torch.autocast(device_type="cpu", dtype=torch.float16):
        loss = nn.functional.mse_loss(model(x).float(), y) / ACCUMULATION
    scaler.scale(loss).backward()
    running_loss += loss.item()
    if i % ACCUMULATION == 0:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.05)
        lr = optimizer.param_groups[0]["lr"]
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        skipped = scaler.get_scale() < before
        if not skipped:
            scheduler.step()
        print(f"step loss={running_loss!r} grad_norm={norm.item()!r} learning_rate={lr!r} skipped={int(skipped)}")
        running_loss = 0.0
