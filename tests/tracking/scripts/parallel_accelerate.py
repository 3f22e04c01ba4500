"""An accelerate loop on several processes, or the same global batches on one: `ddp`, `fsdp` or `one`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, set_seed
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import small_models

from linchain_analysis import LinChainConfig, Tracker

setup, options = sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:])
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
set_seed(0)
model: Any = small_models.llama()
model = get_peft_model(model, LinChainConfig(r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"]))
if setup == "fsdp":
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap"
    )
    if options.get("policy") == "peft":
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    # Accelerate offers sharding on accelerators only; what it does is the same on CPUs.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
tracker: Any = Tracker(model, optimizer, options["tracker"]) if "tracker" in options else contextlib.nullcontext()
with tracker:
    for number in range(8):
        parts = [small_models.batch("llama", 2 * number + rank) for rank in range(2)]
        batch = parts[accelerator.process_index]
        if accelerator.num_processes == 1:
            batch = {name: torch.cat([part[name] for part in parts]) for name in batch}
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
            optimizer.step()
            optimizer.zero_grad()
accelerator.end_training()
# torch 2.13 aborts where a thread of gloo has to let go of a tensor when the interpreter has ended already.
time.sleep(0.3)
