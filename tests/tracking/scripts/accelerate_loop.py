"""An Accelerate loop in bfloat16, with accumulation, clipping and a prepared scheduler."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


def main():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    data = TensorDataset(torch.randn(48, 16), torch.randn(48, 4))
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    losses = []
    for _epoch in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                losses.append(loss.item() / accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    lr = scheduler.get_last_lr()[0]
                    print(f"step loss={sum(losses)!r} grad_norm={norm.item()!r} learning_rate={lr!r}")
                    losses = []
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
