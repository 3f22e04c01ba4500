"""One training after the other, each in another way: python variants.py [--out X] [--preset Y] NAME…"""

import argparse
import gc

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS = 3


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        self.reentrant = reentrant

    def block(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self.block(x))
        return self.second(checkpoint(self.block, x, use_reentrant=self.reentrant))


def adapted(**kwargs):
    return get_peft_model(Net(**kwargs), LoraConfig(r=4, target_modules=["first", "second"]))


def train(name, model, dtype=torch.float32, autocast=False, compiled_step=False):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled_step else optimizer.step
    for _ in range(STEPS):
        x, y = torch.randn(8, 16, dtype=dtype), torch.randn(8, 4, dtype=dtype)
        x.requires_grad_(name == "reentrant")  # or nothing flows through the checkpoint
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        step()
        print(f"step run={name} loss={loss.item()!r} grad_norm={norm.item()!r} learning_rate=0.01")


def train_whole(name, model):
    """The whole training step is compiled."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    @torch.compile(backend="aot_eager")
    def step(x, y):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        return loss.detach(), norm

    for _ in range(STEPS):
        loss, norm = step(torch.randn(8, 16), torch.randn(8, 4))
        print(f"step run={name} loss={loss.item()!r} grad_norm={norm.item()!r} learning_rate=0.01")


def train_two(name):
    """Two models and two optimisers side by side, one loss."""
    models = [adapted(), adapted()]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    for _ in range(STEPS):
        x, y = torch.randn(8, 16), torch.randn(8, 4)
        loss = nn.functional.mse_loss(models[0](x) + models[1](x), y)
        loss.backward()
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step run={name}-{index} loss={loss.item()!r} grad_norm={norm.item()!r} learning_rate=0.1")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="nowhere")
    parser.add_argument("--preset", required=True)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    print(args)
    for name in args.names:
        torch.manual_seed(0)
        if name == "compiled":
            train(name, torch.compile(adapted(), backend="aot_eager"), compiled_step=True)
        elif name == "whole":
            train_whole(name, adapted())
        elif name in ("reentrant", "checkpointed"):
            train(name, adapted(reentrant=name == "reentrant"))
        elif name == "bf16":
            train(name, adapted().to(torch.bfloat16), dtype=torch.bfloat16)
        elif name == "autocast":
            train(name, adapted(), autocast=True)
        elif name == "two":
            train_two(name)
        elif name == "crash":
            raise RuntimeError("the script's own failure")
        gc.collect()


if __name__ == "__main__":
    main()
