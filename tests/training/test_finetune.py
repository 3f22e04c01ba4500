from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from linchain_analysis import load_run
from linchain_analysis.errors import InputError, RunError
from linchain_analysis.training import FinetuneSettings, finetune
from linchain_analysis.training.batches import collate
from linchain_analysis.training.preparation import PreparedProblem, prepare
from linchain_analysis.training.trainer import _count_steps, _spread

STEPS = 6


@pytest.fixture(scope="module")
def settings(tiny_model: str, tiny_data: str) -> FinetuneSettings:
    return FinetuneSettings(
        "linchain-3-4",
        model=tiny_model,
        data=tiny_data,
        num_eval=4,
        learning_rate=0.02,
        num_steps=STEPS,
        batch_size=4,
        schedule="constant",
    )


@pytest.fixture(scope="module")
def prepared(settings: FinetuneSettings) -> PreparedProblem:
    return prepare(settings)


@pytest.fixture(scope="module")
def run_folder(settings: FinetuneSettings, prepared: PreparedProblem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    return finetune(replace(settings, save_adapter=True), out, prepared=prepared)


def train(settings: FinetuneSettings, prepared: PreparedProblem, out: Path) -> np.ndarray:
    return load_run(finetune(settings, out, prepared=prepared)).steps["loss"].to_numpy()


def test_a_run_is_recorded_with_what_it_was_made_of(run_folder: Path, settings: FinetuneSettings) -> None:
    manifest = load_run(run_folder).manifest
    assert manifest.status == "complete"
    assert (manifest.method, manifest.init_seed, manifest.data_seed) == ("linchain-3-4", 0, 0)
    assert manifest.base_learning_rate == 0.02
    recorded = FinetuneSettings.from_json(manifest.extra["settings"])
    assert recorded == replace(settings, save_adapter=True)


def test_the_loss_falls_in_training_and_on_held_out_records(run_folder: Path) -> None:
    run = load_run(run_folder)
    assert len(run.steps) == STEPS
    # Under a frozen random head little can be learned; batches differ by some 0.02 nats before anything is.
    assert run.steps["loss"].iloc[-1] < run.steps["loss"].iloc[0] - 0.1
    losses = run.evals[run.evals["metric"] == "loss"].set_index("step")["value"]
    assert losses.loc[STEPS] < losses.loc[0] - 0.1


def test_loss_and_accuracy_are_measured_before_and_after(run_folder: Path) -> None:
    evals = load_run(run_folder).evals
    for metric in ("loss", "accuracy"):
        rows = evals[(evals["split"] == "eval") & (evals["metric"] == metric)]
        assert sorted(rows["step"]) == [0, STEPS]


def test_tokens_are_counted_without_padding(run_folder: Path, prepared: PreparedProblem) -> None:
    tokens = load_run(run_folder).steps["tokens"]
    lengths = sorted(len(prepared.train[k]["input_ids"]) for k in range(len(prepared.train)))
    assert STEPS * 4 * lengths[0] <= tokens.iloc[-1] <= STEPS * 4 * lengths[-1]
    assert (np.diff(tokens) > 0).all()


def test_the_saved_adapter_is_the_trained_one(run_folder: Path) -> None:
    weights = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().max() > 0 for name, tensor in weights.items())


def test_equal_settings_give_bit_identical_runs(
    run_folder: Path, settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # whatever ran before in this process must not matter
    again = train(settings, prepared, tmp_path / "again")
    np.testing.assert_array_equal(again, load_run(run_folder).steps["loss"].to_numpy())


def test_dropout_belongs_to_the_data_seed(
    settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    dropped = replace(settings, dropout=0.5)
    first = train(dropped, prepared, tmp_path / "a")
    np.testing.assert_array_equal(train(dropped, prepared, tmp_path / "b"), first)
    assert not np.array_equal(train(settings, prepared, tmp_path / "c"), first)


def test_the_seeds_are_apart(
    run_folder: Path, settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    reference = load_run(run_folder)
    # delta is 0 at the first step whatever the factors: an equal first loss means equal records, and different later
    # losses mean different factors.
    other_init = train(replace(settings, init_seed=1), prepared, tmp_path / "init")
    assert other_init[0] == reference.steps["loss"].iloc[0]
    assert other_init[-1] != reference.steps["loss"].iloc[-1]
    other_data = train(replace(settings, data_seed=1), prepared, tmp_path / "data")
    assert other_data[0] != reference.steps["loss"].iloc[0]


def test_methods_see_the_same_records(
    run_folder: Path, settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    lora = train(replace(settings, method="lora-4"), prepared, tmp_path / "lora")
    assert lora[0] == load_run(run_folder).steps["loss"].iloc[0]


def test_accumulated_batches_make_one_step(
    run_folder: Path, settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    halves = train(replace(settings, batch_size=2, accumulation=2, num_steps=2), prepared, tmp_path / "halves")
    assert len(halves) == 2
    # The same 4 records in sums of another order: float32 rounding over some 100 terms.
    np.testing.assert_allclose(halves[0], load_run(run_folder).steps["loss"].iloc[0], rtol=1e-5)


def test_each_step_is_told(settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path) -> None:
    told: list[tuple[int, int, float | None]] = []
    finetune(
        replace(settings, num_steps=3),
        tmp_path / "run",
        prepared=prepared,
        on_step=lambda *step: told.append(step),
    )
    assert [(step, num_steps) for step, num_steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1][2] is not None and 0 < told[-1][2] < 10


def test_a_run_that_ends_by_an_error_says_so(
    settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path
) -> None:
    def fail(step: int, num_steps: int, loss: float | None) -> None:
        if step == 2:
            raise ArithmeticError("no more steps")

    with pytest.raises(ArithmeticError, match="no more steps"):
        finetune(settings, tmp_path / "run", prepared=prepared, on_step=fail)
    assert load_run(tmp_path / "run").manifest.status == "failed"


def test_a_folder_with_content_is_refused(settings: FinetuneSettings, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunError, match="expected a new or empty folder"):
        finetune(settings, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_unknown_method_is_refused(settings: FinetuneSettings, prepared: PreparedProblem, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chainlora-7"):
        finetune(replace(settings, method="chainlora-7"), tmp_path / "run", prepared=prepared)
    assert not (tmp_path / "run").exists()


def test_missing_data_are_refused(settings: FinetuneSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json"):
        prepare(replace(settings, data=str(tmp_path / "nowhere.json")))


def test_batches_are_padded_on_the_right() -> None:
    def example(*ids: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(ids)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens + 10}

    batch = collate([example(5, 6, 7), example(8)], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[15, 16, 17], [18, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64


def test_epochs_become_steps() -> None:
    # 10 records in batches of 2 × 2 are 3 steps an epoch, the last of them smaller.
    half = FinetuneSettings("lora-16", epochs=0.5, batch_size=2, accumulation=2)
    assert _count_steps(half, 10) == 2
    assert _count_steps(replace(half, epochs=3.0), 10) == 9
    assert _count_steps(replace(half, epochs=0.01), 10) == 1


def test_seeds_have_no_common_streams() -> None:
    # Accelerate shuffles epoch e with seed + e: seeds that lie closer than a run's epochs would share orders.
    orders = sorted(_spread(seed)[0] for seed in range(100))
    assert np.diff(orders).min() > 1000
    assert all(_spread(seed)[0] != _spread(seed)[1] for seed in range(100))


def test_records_are_encoded_when_asked_for(prepared: PreparedProblem) -> None:
    first = next(iter(DataLoader(prepared.evaluation, batch_size=1)))
    assert prepared.evaluation[0] is prepared.evaluation[0]
    assert first["input_ids"].dtype == torch.int64
