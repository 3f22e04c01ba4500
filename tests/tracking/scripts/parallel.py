"""A training on several processes, or the same global batches on one: `parallel.py SETUP [key=value …]`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import small_models

from linchain_analysis import LinChainConfig, Tracker
from linchain_analysis.tracking import ranks

setup, options = sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:])
ranks.MEETING_TIMEOUT_S = float(options.get("meeting", 10))
ranks.EXCHANGE_TIMEOUT_S = float(options.get("exchange", 60))
# Too large for the first step, and then small enough.
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20, enabled="scaler" in options)
STEPS, PASSES, RANKS = int(options.get("steps", 4)), int(options.get("passes", 2)), int(options.get("ranks", 2))
rank = int(os.environ.get("RANK", "0"))
alone = setup == "one"
if not alone:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))


def build() -> Any:
    torch.manual_seed(0)
    base = small_models.llama()
    r = int(options.get("r", 5))
    targets = ["q_proj", "v_proj", "down_proj"]
    if options.get("method", "lora") == "lora":
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=options.get("init", True))
    else:
        config = LinChainConfig(r=r, lora_alpha=2 * r, chain_length=2, target_modules=targets)
    return get_peft_model(base, config).to(getattr(torch, options.get("dtype", "float64")))


def shard(model: Any) -> Any:
    """Apply `fully_shard` in one of the ways that people do."""
    mesh = None
    if setup == "hsdp":
        mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS // 2, 2), mesh_dim_names=("replicate", "shard"))
    how = options.get("shard", "blocks")
    ends = {"leaves": ("lora_A.default", "lora_B.default"), "chains": ("lora_A.default",), "layers": ("_proj",)}
    for name, module in list(model.named_modules()):
        if name.endswith(ends.get(how, ())) and any(p.requires_grad for p in module.parameters()):
            fully_shard(module, mesh=mesh)
    if how == "columns":
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
        return fully_shard(model, mesh=mesh)
    if how != "root":
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def clip(model: Any) -> None:
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], float(options.get("clip", 0.05)))


def main() -> None:
    model = build()
    wrapped: Any = model
    if setup == "ddp":
        wrapped = DistributedDataParallel(model)
    elif setup in ("fsdp", "hsdp"):
        wrapped = shard(model)
    elif setup == "fsdp1":
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    if "look" in options:  # which leaves the root of a sharded model whole
        with torch.no_grad():
            wrapped(input_ids=small_models.batch("llama", 99)["input_ids"])
    here = "tracker" in options and (rank == 0 or "only" not in options)
    tracker: Any = contextlib.nullcontext()
    if here:
        every = int(options.get("every", 1))
        tracker = Tracker(model, optimizer, options["tracker"], preset=options.get("preset", "standard"), every=every)
        if "live" in options and rank == 0:
            tracker._recorder._observers.append(Live())
    joining = wrapped.join() if "early" in options else contextlib.nullcontext()
    with tracker, joining:
        for step in range(STEPS):
            if options.get("early") == str(step) and rank == 1:
                break
            train_step(model, wrapped, optimizer, step)
            if options.get("fault") == str(step):
                break_something(tracker)
    if setup in ("fsdp", "hsdp"):
        weights = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    else:
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0 and "weights" in options:
        torch.save(weights, options["weights"])
    if here:
        print(f"path rank={rank} path={tracker.path} steps={tracker.num_steps}")


class Live:
    """Keeps what was read before it is stored in float32."""

    name = "live"

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def see(self, finished: Any) -> None:
        kept = {name: np.array([value]) for name, value in finished.values.items() if name != "seconds"}
        reading = finished.reading
        if reading is not None:
            kept |= dict(reading.factors)
            kept["descent_cosine"] = reading.descent_cosine
            for name in ("delta_spectrum", "delta_update_spectrum"):
                kept[name] = np.concatenate([s for s in getattr(reading, name) if s is not None] or [np.zeros(0)])
        self.steps.append(kept)
        torch.save(self.steps, options["live"])

    def close(self) -> None:
        pass


def train_step(model: Any, wrapped: Any, optimizer: Any, step: int) -> None:
    total = 0.0
    for number in range(PASSES):
        syncs = number == PASSES - 1 or "sync" in options
        with contextlib.ExitStack() as stack:
            if setup == "ddp" and not syncs:
                stack.enter_context(wrapped.no_sync())
            elif setup in ("fsdp", "hsdp"):
                wrapped.set_requires_gradient_sync(syncs)
            seeds = [(step * PASSES + number) * RANKS + r for r in range(RANKS)]
            batches = [small_models.batch("llama", seed) for seed in seeds]
            whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
            batch = whole if alone else batches[rank]
            logits = wrapped(input_ids=batch["input_ids"]).logits  # the model's own loss is in float32
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()) / PASSES
            scaled: Any = scaler.scale(loss)
            scaled.backward()
            total += loss.item()
    scaler.unscale_(optimizer)
    if "clip" not in options or float(options["clip"]):
        clip(model)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(f"step rank={rank} step={step + 1} loss={total!r}", flush=True)


def break_something(tracker: Any) -> None:
    if options.get("where", "0") != str(rank):
        return

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 0:
        tracker._writer.append = fail
    else:
        tracker._recorder._read_gradients = fail


main()
if not alone:
    distributed.destroy_process_group()
    # torch 2.13 aborts where a thread of gloo has to let go of a tensor when the interpreter has ended already.
    time.sleep(0.3)
