"""What is found in a script that says nothing, and what becomes of it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import CallbackHandler, TrainerControl

from linchain_analysis import Tracker, load_run
from linchain_analysis.tracking import interception
from linchain_analysis.tracking.discovery import Discovery
from linchain_analysis.tracking.trainers import TrainerEvents


def adapted(seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0", "1"]))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 2) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Discovery]:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, known: Any) -> Tracker:
        return Tracker(model, optimizer, tmp_path / f"run-{number}", strict=True, quiet=True, **known)

    discovery = Discovery(make)
    yield discovery
    discovery.close()
    for tracker in discovery.trackers:
        tracker.close()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def modules_of(discovery: Discovery) -> list[list[str]]:
    for tracker in discovery.trackers:
        tracker.close()
    return [[record.module for record in load_run(t.path).manifest.modules] for t in discovery.trackers]


class NoTracker:
    """Stands in for a tracker, where only what is found is of interest."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def catch_up(self, losses: Any, scaler: Any) -> None: ...

    def close(self) -> None: ...


def test_wrapped_models(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    found = Discovery(lambda model, optimizer, number, known: NoTracker(model))
    sharded = adapted()
    for layer in sharded.base_model.model:
        fully_shard(layer)
    holder = nn.ModuleDict({"net": adapted()})
    for model in (
        DistributedDataParallel(adapted()),
        torch.compile(adapted(), backend="eager"),
        fully_shard(sharded),
        nn.Sequential(holder["net"], nn.Identity()),  # two hold the same adapter
    ):
        num_before = len(found.trackers)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        train(model, optimizer)
        assert len(found.trackers) == num_before + 1
        assert {*trainable(found.trackers[-1].model)} == {*trainable(model)}
        assert found.trackers[-1].model in (model, holder)
    found.close()


def test_an_adapter_that_comes_after_the_optimiser(found: Discovery) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
    train(base, optimizer)
    assert found.trackers == []
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    optimizer.add_param_group({"params": trainable(model)})
    train(model, optimizer, 3)
    assert [tracker.num_steps for tracker in found.trackers] == [3]
    assert modules_of(found) == [["0"]]


def test_optimisers_that_train_no_adapter_are_left_alone(found: Discovery) -> None:
    model = adapted()
    head = nn.Linear(4, 2)
    whole = nn.Sequential(model, head)
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    others = [torch.optim.SGD(head.parameters(), lr=0.1), torch.optim.SGD([model.base_model.model[0].weight], lr=0.1)]
    for optimizer in others:
        train(whole, optimizer)
    assert found.trackers == []
    assert "got 4 optimiser steps, none of an adapter;" in found.describe_nothing()


def test_one_optimiser_for_two_models_and_modules_that_hold_each_other(found: Discovery) -> None:
    first, second = adapted(), adapted(1)
    first.base_model.model[0].back = first  # a cycle, so that no module is outermost
    optimizer = torch.optim.SGD([*trainable(first), *trainable(second)], lr=0.1)
    for _ in range(2):
        (first(torch.ones(1, 6)) + second(torch.ones(1, 6))).sum().backward()
        optimizer.step()
    (names,) = modules_of(found)
    assert len(names) == len(set(names)) == 4


class SharpnessAware(torch.optim.Optimizer):
    """As it is passed from hand to hand: steps twice, and lets another optimiser do the second."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        closure = torch.enable_grad()(closure)
        closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        ascents = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in parameters]
        torch._foreach_add_(parameters, ascents)
        closure()
        torch._foreach_sub_(parameters, ascents)
        self.base_optimizer.step()


def test_an_optimiser_that_steps_another_has_one_run(found: Discovery) -> None:
    model = adapted()
    optimizer = SharpnessAware(trainable(model))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert [tracker.num_steps for tracker in found.trackers] == [3]


class Ended:
    """What a tracker was told by a Trainer."""

    def __init__(self) -> None:
        self.evaluations: list[tuple[str, dict[str, float]]] = []
        self.closed: list[Any] = []

    def log_eval(self, split: str, **metrics: float) -> None:
        self.evaluations.append((split, metrics))

    def close(self, *how: Any) -> None:
        self.closed.append(how)


@pytest.mark.parametrize("step", [0, 4])
def test_evaluations_before_a_training_are_of_its_start_not_of_a_checkpoint(step: int) -> None:
    events, tracker, known = TrainerEvents(), Ended(), {}
    args = SimpleNamespace(learning_rate=0.1, seed=3, data_seed=None)
    events.evaluated({"eval_loss": 1.0, "eval_runtime": 2.0, "epoch": 0, "eval_note": "text"})
    state = SimpleNamespace(max_steps=9, global_step=step)
    events.train_begins(args, state, lambda said: known.update(said) or tracker)
    assert tracker.evaluations == ([] if step else [("eval", {"loss": 1.0})])
    assert (known["resume"], known["init_seed"], known["data_seed"], known["num_steps"]) == (step or False, 3, 3, 9)
    events.train_begins(args, state, lambda said: None)  # which is not tracked
    events.evaluated({"eval_loss": 1.0})
    events.train_ends()
    assert tracker.closed == [("interrupted", "training began anew")]


def test_a_trainer_that_goes_before_its_training_ended(found: Discovery) -> None:
    def begin() -> None:
        model = adapted()
        handler = CallbackHandler([], model, None, torch.optim.SGD(trainable(model), lr=0.1), None)
        args = SimpleNamespace(learning_rate=0.1, seed=3, data_seed=None)
        state = SimpleNamespace(max_steps=9, global_step=0, epoch=0.5, num_input_tokens_seen=0)
        control = TrainerControl()
        assert handler.on_train_begin(args, state, control) is control
        train(model, handler.optimizer)
        handler.on_step_end(args, state, control)

    begin()
    gc.collect()
    (tracker,) = found.trackers
    run = load_run(tracker.path)
    assert (run.status, run.manifest.num_steps) == ("interrupted", 9)
    assert run.steps["epoch"].fillna(-1).tolist() == [-1, 0.5]


def test_what_a_script_tracks_itself_is_not_tracked_twice(found: Discovery, tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with Tracker(model, optimizer, tmp_path / "own", strict=True, quiet=True):
        train(model, optimizer)
    assert found.trackers == []
    assert "tracks its training itself" in found.describe_nothing()


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_run_ends_when_its_optimiser_is_freed_and_keeps_nothing(found: Discovery, scheduled: bool) -> None:
    def run() -> None:
        model = adapted()
        optimizer = torch.optim.Adam(trainable(model), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer) if scheduled else None
        train(model, optimizer)
        if scheduler:
            scheduler.step()

    run()
    gc.collect()
    (tracker,) = found.trackers
    assert (load_run(tracker.path).status, tracker.num_steps) == ("complete", 2)
    assert not [found for found in gc.get_objects() if type(found) is PeftModel]
    assert not interception._PATCHES._watches


def test_an_optimiser_freed_in_another_thread_is_closed_in_this_one(found: Discovery) -> None:
    model = adapted()
    held = [torch.optim.SGD(trainable(model), lr=0.1)]
    train(model, held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    (tracker,) = found.trackers
    assert load_run(tracker.path).status == "running"
    model(torch.randn(3, 6)).sum().backward()  # nothing listens any more, and nothing fails
    torch.optim.SGD(trainable(model), lr=0.1)
    assert load_run(tracker.path).status == "complete"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_not_tracked(found: Discovery) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train(model, optimizer)
    child = os.fork()
    if child == 0:
        optimizer.step()
        other = adapted()
        train(other, torch.optim.SGD(trainable(other), lr=0.1))
        alone = found.trackers[0].num_steps == 2 and len(found.trackers) == 1 and not interception._PATCHES._originals
        os._exit(0 if alone else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    train(model, optimizer, 1)
    assert found.trackers[0].num_steps == 3


def test_nothing_at_all(found: Discovery) -> None:
    assert "got no optimiser;" in found.describe_nothing()
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert "got 1 optimiser, never seen to step;" in found.describe_nothing()
