"""Adapters trained for a few steps on small models and saved, as an audit finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from peft import PeftModel, get_peft_model

torch.set_num_threads(1)

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Adapt a small model, train it, save the adapter, and return its folder; `base/` beside it holds the model."""

    def _save(name: str, config: Any, *, steps: int = 3, seed: int = 0, base: bool = False, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(seed)
        model = small_models.BUILDERS[name]().eval()
        if base:
            model.save_pretrained(folder / "base")
        adapted: PeftModel = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for step in range(steps):
            adapted(**small_models.batch(name, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(folder / "adapter", **options)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return folder / "adapter"

    return _save
