"""A training resumed from a checkpoint goes on with its run, whose numbers are those of an unbroken one."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_training
import torch
import trainer_training
from torch import nn

from linchain_analysis import Tracker, TrackerCallback, load_run
from linchain_analysis.runs import Run

# What may differ: times, and cosines with gradients that were not kept.
TIMES = ("seconds", "track_seconds")
# Of numbers that are stored in float32, and of spectra next to what is far larger.
RTOL, ATOL = 2e-6, 1e-7


@dataclass
class Training:
    """A model and its optimiser, and what a checkpoint keeps of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any = None
    at: int = 0
    losses: list[float] = field(default_factory=list)

    def train(self, until: int) -> None:
        for number in range(self.at + 1, until + 1):
            if self.scaler is None:
                loss = small_training.train_step(self.model, self.optimizer, number)
            else:
                loss = scaled_step(self, number)
            self.losses.append(loss.item())
        self.at = until

    def save(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "at": self.at}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return copy.deepcopy(state)

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)  # as a file would be read anew: an optimiser works on in what it is given
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.at = state["at"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def scaled_step(training: Training, number: int) -> torch.Tensor:
    """A step under a gradient scaler; Inf in the gradients of steps 4 and 9, which are left out."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator)
    training.optimizer.zero_grad()
    loss = (training.model(x) - y).square().mean()
    training.scaler.scale(loss * torch.inf if number in (4, 9) else loss).backward()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return loss.detach()


def begin(kind: str = "AdamW", method: str = "linchain-2-4", **overrides: Any) -> Training:
    model = small_training.build(method, **overrides)
    return Training(model, small_training.optimize(model, kind))


def assert_equal(resumed: Run, unbroken: Run, after: tuple[int, ...]) -> dict[str, float]:
    """Compare all tables; return the largest difference of each column. `after`: steps that were resumed after."""
    largest: dict[str, float] = {}
    recorded = unbroken.modules["step"].unique()
    anew = {int(following[0]) for step in after if len(following := recorded[recorded > step])}
    for table in ("steps", "modules", "factors", "links", "evals"):
        found, expected = resumed.read(table), unbroken.read(table)
        keys = [name for name in ("step", "module", "factor", "link", "split", "metric") if name in expected]
        assert found[keys].astype(str).values.tolist() == expected[keys].astype(str).values.tolist(), table
        assert set(found) == set(expected), table
        for name in expected:
            if name in (*keys, *TIMES):
                continue
            for step, a, b in zip(found["step"], found[name], expected[name], strict=True):
                if name == "grad_cosine_previous" and step in anew:
                    assert np.isnan(a)
                elif isinstance(b, (str, type(None))) or b is pd.NA:
                    assert a is b or a == b
                else:
                    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
                    # Balance drift and what derives from it subtract numbers of the size of the squares.
                    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
                    np.testing.assert_allclose(
                        a, b, rtol=RTOL, atol=max(ATOL, RTOL * scale), err_msg=f"{table}.{name} at step {step}"
                    )
                    if b.size and np.isfinite(b).any():
                        difference = np.nanmax(np.abs(a - b)) / max(scale, 1e-30)
                        largest[f"{table}.{name}"] = max(largest.get(f"{table}.{name}", 0.0), float(difference))
    kept = [run.read("snapshots", ["step", "module"]).astype(str).values.tolist() for run in (resumed, unbroken)]
    assert kept[0] == kept[1]
    return largest


CASES: dict[str, dict[str, Any]] = {
    "linchain": {},
    "lora": {"method": "lora-4"},
    "rslora": {"method": "lora-4", "use_rslora": True},
    "pissa": {"method": "lora-4", "init_lora_weights": "pissa"},
    "full": {"tracked": {"preset": "full", "sample_every": 3, "snapshot_every": 4}},
    "full pissa": {"method": "lora-4", "init_lora_weights": "pissa", "tracked": {"preset": "full", "sample_every": 3}},
    "light": {"tracked": {"preset": "light"}},
    "every": {"tracked": {"every": 3}},
    "auto": {"tracked": {"every": "auto"}},
    "sgd": {"kind": "SGD", "said": True},
    "skipped": {"scaler": True},
}


def run_case(
    tmp_path: Path,
    breaks: tuple[tuple[int, int], ...],
    *,
    tracked: dict[str, Any] | None = None,
    said: bool = False,
    scaler: bool = False,
    closes: bool = True,
    **how: Any,
) -> dict[str, float]:
    """Train twelve steps at one go and in pieces, each of which goes on until a step and back to a checkpoint."""
    options = {"strict": True, "quiet": True, **(tracked or {})}

    def make() -> Training:
        training = begin(**how)
        if scaler:
            training.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return training

    whole = make()
    with Tracker(whole.model, whole.optimizer, tmp_path / "whole", **options) as tracker:
        for number in range(1, 13):
            whole.train(number)
            if number == 6:
                tracker.log_eval("eval", loss=0.5)
            tracker.log(extra=number)
    state: dict[str, Any] | None = None
    for until, checkpoint in (*breaks, (12, 12)):
        piece = make()
        if state is not None:
            piece.load(state)
        resume = {"resume": piece.at} if said and piece.at else {}
        tracker = Tracker(piece.model, piece.optimizer, tmp_path / "run", **options, **resume)
        assert tracker.path == tmp_path / "run"
        assert tracker.num_steps == piece.at
        for number in range(piece.at + 1, until + 1):
            piece.train(number)
            if number == 6:
                tracker.log_eval("eval", loss=0.5)
            tracker.log(extra=number)
            if number == checkpoint:
                state = piece.save()
        if closes:
            tracker.close()
        else:
            abandon(tracker)
        assert piece.losses == whole.losses[until - len(piece.losses) : until]
    return assert_equal(load_run(tmp_path / "run"), load_run(tmp_path / "whole"), tuple(at for _, at in breaks))


def abandon(tracker: Tracker) -> None:
    """Leave a run as a process that is killed does."""
    assert tracker._watch and tracker._writer
    tracker._watch.close()
    tracker._writer._lock.release()
    tracker._closed = True


@pytest.mark.parametrize("case", list(CASES))
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, case: str) -> None:
    largest = run_case(tmp_path, ((8, 6),), **CASES[case])
    print(case, max(largest.items(), key=last))
    assert len(load_run(tmp_path / "run").steps) == 12


def test_resumed_at_a_step_that_was_not_recorded_whole(tmp_path: Path) -> None:
    run_case(tmp_path, ((8, 7), (11, 8)), tracked={"every": 3})


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("breaks", [((8, 6), (9, 7)), ((5, 5), (9, 9), (10, 9)), ((11, 3), (11, 3))])
def test_resumed_several_times(tmp_path: Path, breaks: tuple[tuple[int, int], ...], closes: bool) -> None:
    """Each time from a later checkpoint, from one at the very end, and twice from the same one."""
    run_case(tmp_path, breaks, closes=closes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_a_budget_is_for_all_parts_of_a_run(tmp_path: Path) -> None:
    """What stands on the disk already counts, and no part begins as densely as the first."""
    training, tables = begin(), []
    for until in (200, 300, 400, 500, 600):
        options = {"every": "auto", "log_budget_bytes": 400_000, "strict": True, "quiet": True}
        with Tracker(training.model, training.optimizer, tmp_path / "run", **options):
            training.train(until)
        tables = [path for path in (tmp_path / "run").iterdir() if path.suffix == ".parquet"]
    run = load_run(tmp_path / "run")
    counts = np.histogram(run.modules["step"].unique(), bins=[0, 100, 200, 300, 400, 500, 600])[0]
    print("bytes", sum(path.stat().st_size for path in tables), "recorded", counts)
    assert len(run.steps) == 600
    assert counts[0] == 99  # of 1 … 99
    assert counts[1:].max() < 70
    assert sum(path.stat().st_size for path in tables) < 400_000


def recorded(path: Path, until: int = 6, **options: Any) -> tuple[Training, dict[str, Any]]:
    """A run of so many steps, its training, and its checkpoint after the fourth."""
    training = begin()
    with Tracker(training.model, training.optimizer, path, strict=True, quiet=True, **options):
        training.train(4)
        state = training.save()
        training.train(until)
    return training, state


def go_on(path: Path, training: Training, **options: Any) -> Path:
    with Tracker(training.model, training.optimizer, path, strict=True, quiet=True, **options) as tracker:
        training.train(training.at + 1)
    return tracker.path


def other_weights(training: Training) -> None:
    with torch.no_grad():
        next(p for p in training.model.parameters() if p.requires_grad).mul_(1.001)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: None, {"resume": False}, "holds a run already"),
        (lambda t: None, {"include": "0"}, "its modules are others"),
        (other_weights, {}, "A of 0 had norm"),
        (other_weights, {"resume": 4}, "A of 0 had norm"),
        (lambda t: t.train(5), {"resume": 4}, "had norm"),
        (lambda t: t.train(9), {}, "it has 6 updates and the training stands at 9"),
        (lambda t: t.train(9), {"resume": 9}, "it has 6 steps and the training stands at 9"),
        (lambda t: t.model.base_model.model[0].set_scale("default", 3), {}, "its scale of 0 was 2 and is 6"),
    ],
    ids=["said", "modules", "weights", "weights at a step said", "another step", "updates", "steps", "scale"],
)
def test_another_training_is_put_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, options: dict[str, Any], message: str
) -> None:
    _, state = recorded(tmp_path / "run")
    before = load_run(tmp_path / "run").steps
    training = begin()
    training.load(state)
    change(training)
    assert go_on(tmp_path / "run", training, **options) == tmp_path / "run-2"
    assert message in caplog.text
    assert caplog.text.count("written to") == 1
    pd.testing.assert_frame_equal(load_run(tmp_path / "run").steps, before)
    assert load_run(tmp_path / "run-2").steps["step"].tolist() == [1]


def test_the_run_that_was_put_beside_another_is_found(tmp_path: Path) -> None:
    other = begin()
    other_weights(other)
    assert go_on(tmp_path / "run", other) == tmp_path / "run"
    training = begin()
    with Tracker(training.model, training.optimizer, tmp_path / "run", quiet=True) as tracker:
        training.train(3)
    assert tracker.path == tmp_path / "run-2"
    again = begin()
    again.load(training.save())
    assert go_on(tmp_path / "run", again) == tmp_path / "run-2"
    assert load_run(tmp_path / "run-2").steps["step"].tolist() == [1, 2, 3, 4]


def test_a_checkpoint_in_fewer_bits_is_recognised(tmp_path: Path) -> None:
    _, state = recorded(tmp_path / "run")
    state["model"] = {name: value.bfloat16().float() for name, value in state["model"].items()}
    training = begin()
    training.load(state)
    assert go_on(tmp_path / "run", training) == tmp_path / "run"
    assert load_run(tmp_path / "run").num_steps == 5


def test_without_a_record_of_the_weights_only_a_word_counts(tmp_path: Path) -> None:
    for name, options, path in (("a", {}, "a-2"), ("b", {"resume": 4}, "b")):
        _, state = recorded(tmp_path / name, every=100)
        training = begin()
        training.load(state)
        assert go_on(tmp_path / name, training, every=100, **options) == tmp_path / path


def test_a_step_where_there_is_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert go_on(tmp_path / "run", begin(), resume=7) == tmp_path / "run"
    assert "that goes on after step 7, found none" in caplog.text
    assert load_run(tmp_path / "run").num_steps == 1


def test_a_training_goes_on_after_its_run_was_complete(tmp_path: Path) -> None:
    """In one process, with the same optimiser: the second `with` goes on where the first one ended."""
    training, _ = recorded(tmp_path / "run")
    assert load_run(tmp_path / "run").status == "complete"
    assert go_on(tmp_path / "run", training) == tmp_path / "run"
    run = load_run(tmp_path / "run")
    assert (run.status, run.num_steps) == ("complete", 7)


def test_a_damaged_run_is_not_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, state = recorded(tmp_path / "run")
    path = tmp_path / "run" / "steps.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    training = begin()
    training.load(state)
    assert go_on(tmp_path / "run", training) == tmp_path / "run-2"
    assert caplog.text.count("got another") == 1


def test_a_run_whose_start_was_lost_is_not_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Delta would be measured from nothing, without a word."""
    training = begin(method="lora-4", init_lora_weights="pissa")
    with Tracker(training.model, training.optimizer, tmp_path / "run", preset="light", strict=True, quiet=True):
        training.train(4)
    (tmp_path / "run" / "initial_factors.safetensors").unlink()
    assert go_on(tmp_path / "run", training, preset="light") == tmp_path / "run-2"
    assert "its start is missing" in caplog.text


# A raw loop that saves a checkpoint every fifth step, and goes on from the last one there is.
RAW = """
from pathlib import Path
from peft import PeftModel
model = build()
if os.path.exists("adapter"):
    model = PeftModel.from_pretrained(model.unload(), "adapter", is_trainable=True)
optimizer = optimize(model)
at = 0
if os.path.exists("adapter/state.pt"):
    state = torch.load("adapter/state.pt")
    optimizer.load_state_dict(state["optimizer"])
    at = state["at"]
with Tracker(model, optimizer, "run", strict=True, quiet=True) as tracker:
    assert tracker.num_steps == at
    for number in range(at + 1, 41):
        train_step(model, optimizer, number)
        print(number, flush=True)
        if number % 5 == 0:
            model.save_pretrained("new")
            torch.save({"optimizer": optimizer.state_dict(), "at": number}, "new/state.pt")
            import shutil
            shutil.rmtree("adapter", ignore_errors=True)
            os.rename("new", "adapter")
"""


@pytest.mark.slow
def test_killed_and_resumed_from_a_saved_adapter_in_another_process(tmp_path: Path) -> None:
    for killed_after in (13, 27, None):
        process = small_training.start(RAW, tmp_path)
        assert process.stdout is not None
        if killed_after is not None:
            while (line := process.stdout.readline()) and int(line) < killed_after:
                pass
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=100)
        assert process.returncode == (0 if killed_after is None else -signal.SIGKILL), err
    training = begin()
    with Tracker(training.model, training.optimizer, tmp_path / "whole", strict=True, quiet=True):
        training.train(40)
    run = load_run(tmp_path / "run")
    assert run.status == "complete"
    resumed_after = tuple(segment.last_step for segment in run.manifest.segments)
    assert len(resumed_after) == 2
    print("raw", max(assert_equal(run, load_run(tmp_path / "whole"), resumed_after).items(), key=last))


OFTEN = """
model = build()
optimizer = optimize(model)
at = 0
if os.path.exists("state.pt"):
    state = torch.load("state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    at = state["at"]
print("loaded", flush=True)
with Tracker(model, optimizer, "run", strict=True, quiet=True) as tracker:
    assert tracker.path.name == "run"
    for number in range(at + 1, 201):
        train_step(model, optimizer, number)
        if number % 5 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": number}, "new.pt")
            os.replace("new.pt", "state.pt")
"""


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(tmp_path: Path) -> None:
    """Also in the milliseconds in which a run is opened to go on."""
    rng = np.random.default_rng()
    kills = 0
    for k in range(40):
        process = small_training.start(OFTEN, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n", process.communicate()[1]
        if k and k < 12:
            time.sleep(float(rng.random()) * (0.05 if k % 2 else 0.4))
            process.send_signal(signal.SIGKILL)
        elif not k:  # until there is a checkpoint, for what began before could not be told from a new training
            while not (tmp_path / "state.pt").exists():
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=100)
        assert process.returncode in (0, -signal.SIGKILL), err
        kills += process.returncode != 0
        if process.returncode == 0 and k >= 12:
            break
    training = begin()
    with Tracker(training.model, training.optimizer, tmp_path / "whole", strict=True, quiet=True):
        training.train(200)
    run = load_run(tmp_path / "run")
    after = tuple(segment.last_step for segment in run.manifest.segments)
    print("kills", kills, "resumed after", after)
    assert len(run.steps) == 200
    print(max(assert_equal(run, load_run(tmp_path / "whole"), after).items(), key=last))


def test_a_trainer_that_resumes_goes_on_with_its_run(tmp_path: Path) -> None:
    for name, pieces in {"whole": [(12, None)], "run": [(7, None), (10, 6), (12, 9)]}.items():
        for until, at in pieces:
            checkpoint = None if at is None else tmp_path / name / "trainer" / f"checkpoint-{at}"
            callback = TrackerCallback(tmp_path / name / "tracked", strict=True, quiet=True)
            trainer_training.train(tmp_path / name, until, checkpoint, [callback])
            assert callback.path == tmp_path / name / "tracked"
            assert callback.tracker is not None and callback.tracker.num_steps == until
    run = load_run(tmp_path / "run" / "tracked")
    print("trainer", max(assert_equal(run, load_run(tmp_path / "whole" / "tracked"), (6, 9)).items(), key=last))


def test_a_trainer_resumed_with_other_weights_has_a_new_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint of another training in the folder of this one."""
    for name, seed in (("run", 7), ("other", 9)):
        callback = TrackerCallback(tmp_path / name / "tracked", strict=True, quiet=True)
        trainer_training.train(tmp_path / name, 6, None, [callback], weight_decay=0.01 * seed)
    callback = TrackerCallback(tmp_path / "run" / "tracked", strict=True, quiet=True)
    trainer_training.train(tmp_path / "run", 8, tmp_path / "other" / "trainer" / "checkpoint-6", [callback])
    assert callback.path == tmp_path / "run" / "tracked-2"
    assert "got another (" in caplog.text
    assert load_run(callback.path).num_steps == 2


UNTRACKED = (
    OFTEN.partition("with Tracker")[0]
    + """
for number in range(at + 1, int(sys.argv[1]) + 1):
    train_step(model, optimizer, number)
    if number % 5 == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": number}, "state.pt")
"""
)


@pytest.mark.slow
def test_a_launched_loop_is_recognised_by_its_optimiser(tmp_path: Path) -> None:
    for until in (8, 12):
        process = small_training.start(UNTRACKED, tmp_path, str(until), launcher=True)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    assert "going on with" in err
    training = begin()
    with Tracker(training.model, training.optimizer, tmp_path / "whole", strict=True, quiet=True):
        training.train(12)
    largest = assert_equal(load_run(tmp_path / "run"), load_run(tmp_path / "whole"), (5,))
    print("launched loop", max(largest.items(), key=last))


@pytest.mark.slow
def test_a_launched_trainer_goes_on_with_its_run(tmp_path: Path) -> None:
    for name, pieces in {"whole": [(12, "-")], "run": [(7, "-"), (12, "trainer/checkpoint-6")]}.items():
        (tmp_path / name).mkdir()
        for until, checkpoint in pieces:
            script = str(Path(trainer_training.__file__))
            done = subprocess.run(
                [sys.executable, "-m", "linchain_analysis.track", "--out", "tracked", script, str(until), checkpoint],
                cwd=tmp_path / name,
                capture_output=True,
                text=True,
                timeout=200,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(script).parent)},
            )
            assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "run" / "tracked")
    print("launched", max(assert_equal(run, load_run(tmp_path / "whole" / "tracked"), (6,)).items(), key=last))


def last(item: tuple[str, float]) -> float:
    return item[1]


def test_steps_that_only_make_the_state_of_an_optimiser_are_none(tmp_path: Path) -> None:
    """torch's distributed checkpoints step an optimiser without state, with gradients and rate 0, to load into it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def begin() -> tuple[Any, Any]:
        model = small_training.build()
        return model, small_training.optimize(model)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        with Tracker(model, optimizer, tmp_path / "run", quiet=True) as tracker:
            for step in steps:
                small_training.train_step(model, optimizer, step)
                optimizer.zero_grad()
                if step == 3:
                    torch.save((model.state_dict(), get_optimizer_state_dict(model, optimizer)), tmp_path / "three")
            assert tracker.num_steps == steps.stop - 1

    train(*begin(), range(1, 6))
    model, optimizer = begin()
    weights, state = torch.load(tmp_path / "three", weights_only=True)
    with Tracker(model, optimizer, tmp_path / "other", quiet=True) as tracker:
        model.load_state_dict(weights)
        set_optimizer_state_dict(model, optimizer, state)
        assert tracker.num_steps == 0
    train(model, optimizer, range(4, 7))
    run = load_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(1, 7))
    assert len(run.manifest.segments) == 1
