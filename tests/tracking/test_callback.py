"""The tracker inside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from linchain_analysis import TrackerCallback, load_run, method_config


class Tokens(Dataset):
    """Rows of random tokens that a causal model is trained to repeat."""

    def __init__(self, size: int = 24) -> None:
        rows = small_models.batch("llama", seed=3, size=size)["input_ids"]
        self.rows = [{"input_ids": row, "labels": row} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def make_trainer(tmp_path: Path, callbacks: list[Any], method: str = "linchain-3-4", **arguments: Any) -> Trainer:
    torch.manual_seed(1)
    model = get_peft_model(small_models.llama(), method_config(method, target_modules=["q_proj", "v_proj"]))
    settings = {
        "output_dir": str(tmp_path / "trainer"),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 7,
        "data_seed": 8,
    }
    return Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=Tokens(),
        eval_dataset=Tokens(4),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_grad_norm", [1e-4, 1.0])
def test_gradient_norm_and_loss_are_what_the_trainer_logs(
    tmp_path: Path, accumulation: int, max_grad_norm: float
) -> None:
    callback = TrackerCallback(tmp_path / "run", strict=True)
    trainer = make_trainer(
        tmp_path,
        [callback],
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
        include_num_input_tokens_seen=True,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    run = load_run(tmp_path / "run")
    assert run.status == "complete"
    assert len(run.steps) == len(logs) == 6
    np.testing.assert_allclose(run.steps["grad_norm"], [entry["grad_norm"] for entry in logs], rtol=1e-6)
    # The Trainer rounds what it logs.
    np.testing.assert_allclose(run.steps["loss"], [float(entry["loss"]) for entry in logs], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run.steps["epoch"], [entry["epoch"] for entry in logs], atol=1e-4)
    assert run.steps["tokens"].tolist() == [entry["num_input_tokens_seen"] for entry in logs]
    expected = np.minimum(1, max_grad_norm / (run.steps["grad_norm"] + 1e-6))
    np.testing.assert_allclose(run.steps["clip_coef"], expected, rtol=1e-5)
    assert (run.init_seed, run.data_seed) == (7, 8)
    assert run.base_learning_rate == 1e-2
    assert run.steps["learning_rate"].iloc[0] == 1e-2  # the rate of the step itself, before the scheduler moves on
    assert run.manifest.every == "auto"


def test_the_trainer_ends_with_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [TrackerCallback(tmp_path / "run", strict=True)]):
        trainer = make_trainer(tmp_path, callbacks, bf16=True)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_evaluations_are_kept_also_those_before_and_after_training(tmp_path: Path) -> None:
    callback = TrackerCallback(tmp_path / "run", strict=True)
    trainer = make_trainer(tmp_path, [callback], eval_strategy="steps", eval_steps=3)
    trainer.evaluate()
    trainer.train()
    during = load_run(tmp_path / "run").evals
    assert during[["step", "split", "metric"]].values.tolist() == [[step, "eval", "loss"] for step in (0, 3, 6)]
    value = trainer.evaluate()["eval_loss"]
    callback.tracker.log_eval("test", accuracy=0.5)
    after = load_run(tmp_path / "run").evals
    assert after[["step", "split", "metric"]].values.tolist()[3:] == [[6, "eval", "loss"], [6, "test", "accuracy"]]
    assert after["value"].tolist()[3:] == [value, 0.5]


def test_each_training_of_a_callback_is_a_run_of_its_own(tmp_path: Path) -> None:
    callback = TrackerCallback(tmp_path / "run", strict=True)
    trainer = make_trainer(tmp_path, [callback], max_steps=2)
    for _ in range(3):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run-2", "run-3"]
    assert callback.path == tmp_path / "run-3"


def test_a_training_that_fails_keeps_its_steps(tmp_path: Path) -> None:
    class Bomb(Tokens):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken > 12:
                raise RuntimeError("no more data")
            return super().__getitem__(index)

    callback = TrackerCallback(tmp_path / "run", strict=True)
    trainer = make_trainer(tmp_path, [callback])
    trainer.train_dataset = Bomb()
    with pytest.raises(RuntimeError, match="no more data"):
        trainer.train()
    assert len(load_run(tmp_path / "run").steps) >= 2
    callback.close("failed", "no more data")
    assert load_run(tmp_path / "run").status == "failed"
