"""Fine-tune one method on one problem through transformers' Trainer, with the tracker on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from linchain_analysis.adapters import method_config
from linchain_analysis.errors import RunError
from linchain_analysis.runs.lock import LOCK
from linchain_analysis.tracking import TrackerCallback
from linchain_analysis.training.batches import collate
from linchain_analysis.training.preparation import PreparedProblem, prepare
from linchain_analysis.training.settings import FinetuneSettings

SPLIT = "eval"  # held-out records, for the loss and for the accuracy
NUM_LOGS = 100  # how often a run tells its loss to whoever watches

OnStep = Callable[[int, int, float | None], None]
"""Called after a step with the step, the number of steps and the latest loss, None before the first is known."""


def finetune(
    settings: FinetuneSettings,
    out: str | Path,
    *,
    prepared: PreparedProblem | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Train one method on one problem and return the run folder `out`.

    The loss on held-out records and the accuracy by generation are measured before the first step and after the last,
    and stand in the run's `evals` as split "eval".

    `init_seed` decides the adapters' initial factors alone. `data_seed` decides the order of the records and the
    dropout masks. Both streams are set anew in each run, so equal settings give bit-identical runs in any process
    with the same number of threads.

    Args:
        settings: What to train. What it leaves open comes from the problem.
        out: Run folder, new or empty.
        prepared: What `prepare(settings)` returned, to load a problem once for many runs.
        on_step: Is told of each step.

    Raises:
        InputError: A setting that cannot be (unknown method, missing data or model).
        RunError: `out` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise RunError(str(out), expected="a new or empty folder", got="one with content", do="choose another name")
    prepared = prepare(settings) if prepared is None else prepared
    settings = settings.resolve(prepared.problem.defaults)
    config = method_config(
        settings.method, target_modules=list(prepared.problem.target_modules), lora_dropout=settings.dropout
    )

    base = prepared.load_model()
    base_accuracy = prepared.measure_base_accuracy(base)
    set_seed(settings.init_seed)
    model = get_peft_model(base, config)

    tracking = TrackerCallback(
        out,
        preset=settings.preset,
        every=settings.every,
        method=settings.method,
        problem=prepared.problem.name,
        base_learning_rate=settings.learning_rate,
        init_seed=settings.init_seed,
        data_seed=settings.data_seed,
        extra={"settings": settings.to_json()},
        close_on_train_end=False,
        # A study without its record is worthless, so here a fault of the tracker does stop the run.
        strict=True,
        quiet=True,
    )
    callbacks = [tracking, _BaseAccuracy(tracking, base_accuracy)]
    if on_step is not None:
        callbacks.append(_StepReport(on_step))
    try:
        with tempfile.TemporaryDirectory(prefix="linchain-trainer-") as scratch:
            trainer = Trainer(
                model=model,
                args=_make_arguments(settings, scratch, len(prepared.train)),
                train_dataset=prepared.train,
                eval_dataset=prepared.evaluation,
                data_collator=partial(collate, pad_token_id=prepared.pad_token_id),
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.evaluate()
        _file_accuracy(tracking, prepared.measure_accuracy(model))
        if settings.save_adapter:
            model.save_pretrained(out / "adapter")
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "interrupted"
        tracking.close(status, f"{type(error).__name__}: {error}")
        raise
    tracking.close()
    return out


def _make_arguments(settings: FinetuneSettings, scratch: str, num_records: int) -> TrainingArguments:
    order_seed, dropout_seed = _spread(settings.data_seed)
    num_steps = settings.num_steps or _count_steps(settings, num_records)
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.num_warmup_steps,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=dropout_seed,
        data_seed=order_seed,
        eval_on_start=True,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=max(1, num_steps // NUM_LOGS),
        include_num_input_tokens_seen="non_padding",
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # a single process on several GPUs would become DataParallel, which copies the model
    return arguments


def _count_steps(settings: FinetuneSettings, num_records: int) -> int:
    assert settings.epochs is not None and settings.batch_size is not None
    per_epoch = -(-num_records // (settings.batch_size * settings.accumulation))
    return max(1, math.ceil(settings.epochs * per_epoch))


def _spread(seed: int) -> tuple[int, int]:
    """Return the seeds of the record order and of the dropout masks.

    Accelerate's sampler shuffles epoch e with seed + e, so that seed 0 in its second epoch would see the order that
    seed 1 saw in its first; hashed seeds have no such neighbours.
    """
    order, dropout = np.random.SeedSequence(seed).generate_state(2)
    return int(order), int(dropout)


def _file_accuracy(tracking: TrackerCallback, accuracy: float) -> None:
    assert tracking.tracker is not None  # made as training begins
    tracking.tracker.log_eval(SPLIT, accuracy=accuracy)


class _BaseAccuracy(TrainerCallback):  # type: ignore[misc]
    """Files the accuracy of the base model under step 0, once the tracker is there."""

    def __init__(self, tracking: TrackerCallback, accuracy: float) -> None:
        self._tracking = tracking
        self._accuracy = accuracy

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _file_accuracy(self._tracking, self._accuracy)


class _StepReport(TrainerCallback):  # type: ignore[misc]
    """Passes each step on, with the latest loss that the Trainer logged."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step, state.max_steps, self._loss)
