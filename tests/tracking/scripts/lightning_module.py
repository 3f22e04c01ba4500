"""A LightningModule, with automatic or manual optimisation."""

import logging
import sys
import warnings

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regressor(L.LightningModule):
    def __init__(self, manual):
        super().__init__()
        self.automatic_optimization = not manual
        net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.net = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"]))
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        if self.automatic_optimization:
            self.losses.append(loss.item() / self.trainer.accumulate_grad_batches)
            return loss
        optimizer = self.optimizers()
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.report(optimizer)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        return None

    def report(self, optimizer):
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        lr = optimizer.param_groups[0]["lr"]
        print(f"step loss={sum(self.losses)!r} grad_norm={norm.item()!r} learning_rate={lr!r}")
        self.losses = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.report(optimizer)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    L.seed_everything(0)
    manual = "--manual" in sys.argv
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=1 if manual else 2,
        gradient_clip_val=None if manual else 0.05,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    data = TensorDataset(torch.randn(48, 16), torch.randn(48, 4))
    trainer.fit(Regressor(manual), DataLoader(data, batch_size=8, shuffle=True))


if __name__ == "__main__":
    main()
