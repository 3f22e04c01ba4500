"""A training of milliseconds a step that is the same in every process, for tests that run it in one of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from linchain_analysis import method_config

# What the scripts of these tests begin with.
PRELUDE = """
import os, signal, sys, time
import torch
from linchain_analysis import Tracker
from small_training import build, optimize, train_step
"""


def build(method: str = "linchain-2-4", **overrides: Any) -> nn.Module:
    """Two adapted layers."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    return get_peft_model(base, method_config(method, target_modules=["0", "2"], **overrides))


def optimize(model: nn.Module, kind: str = "AdamW", lr: float = 1e-2) -> torch.optim.Optimizer:
    return getattr(torch.optim, kind)([p for p in model.parameters() if p.requires_grad], lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """Step `number`, whose data are its own."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator)
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def start(
    script: str, folder: Path, *arguments: str, launcher: bool = False, out: str | None = "run"
) -> subprocess.Popen[str]:
    """Start `script`, after the prelude, in `folder`; launched by the tracker into `out`, or plainly."""
    path = folder / "train.py"
    path.write_text(PRELUDE + script)
    tracker = ["-m", "linchain_analysis.track", *(["--out", out] if out else [])] if launcher else []
    return subprocess.Popen(
        [sys.executable, *tracker, "train.py", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        # A shell without job control has what it starts in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
