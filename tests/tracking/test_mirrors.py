"""Mirrors: what they show is what the run says, and the training notices nothing of them."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from peft import get_peft_model

from linchain_analysis import Tracker, load_run, method_config
from linchain_analysis.errors import InputError
from linchain_analysis.tracking import mirrors
from linchain_analysis.tracking.feed import Feed
from linchain_analysis.tracking.mirrors import check_mirrors
from linchain_analysis.tracking.scalars import DERIVED_COLUMNS, FACTOR_COLUMNS

MODULE_COLUMNS = (*DERIVED_COLUMNS, "descent_cosine")
Scalars = dict[str, dict[int, float]]
HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for scripts that import this file

FAKE = """
import json, pathlib, time

FAIL_AT, SLOW = {fail_at!r}, {slow!r}

class Settings:
    def __init__(self, **given): pass

class Run:
    def define_metric(self, *given, **named): pass
    def log(self, scalars, step=None):
        if FAIL_AT == "log": raise OSError("no space left on the device")
        time.sleep(SLOW)
        with open({log!r}, "a") as file: print(json.dumps([step, scalars]), file=file)
    def finish(self):
        if FAIL_AT == "finish": raise ConnectionError("the server has gone")
        if FAIL_AT == "hang": time.sleep(60)

def init(**given):
    if FAIL_AT == "init": raise PermissionError("not on this machine")
    print("noise of the package")
    return Run()
"""


def adapted(method: str = "linchain-3-4", targets: tuple[str, ...] = ("q_proj", "down_proj")) -> torch.nn.Module:
    torch.manual_seed(1)
    return get_peft_model(small_models.llama(), method_config(method, target_modules=list(targets), lora_dropout=0.1))


def train(
    path: Path | None, num_steps: int = 4, after: Callable[[Any, int], None] | None = None, **options: Any
) -> Any:
    """Train with a tracker into `path` or without one; returns the final weights."""
    model = adapted(options.pop("adapter", "linchain-3-4"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"strict": True, "quiet": True, **options}
    tracker = Tracker(model, optimizer, path, **options) if path else None
    torch.manual_seed(5)
    for seed in range(num_steps):
        optimizer.zero_grad()
        model(**small_models.batch("llama", seed=seed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if tracker and after:
            after(tracker, seed + 1)
    if tracker:
        tracker.close()
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def expected(path: Path) -> Scalars:
    """Every scalar that a mirror of this run shows, from the run itself."""
    run = load_run(path)
    found: Scalars = {}

    def add(frame: pd.DataFrame, columns: tuple[str, ...], name: Callable[[str, Any], str]) -> None:
        for row in frame.to_dict("records"):
            for column in columns:
                if not math.isnan(row[column]):
                    found.setdefault(name(column, row), {})[int(row["step"])] = float(row[column])

    hidden = {"step", "epoch", "tokens", "track_seconds"}
    add(run.steps, tuple(c for c in run.steps if c not in hidden), lambda column, row: f"steps/{column}")
    add(run.modules, MODULE_COLUMNS, lambda column, row: f"{column}/{row['module']}")
    add(run.factors, FACTOR_COLUMNS, lambda column, row: f"{column}/{row['module']}/{row['factor']}")
    add(run.evals, ("value",), lambda column, row: f"evals/{row['split']}/{row['metric']}")
    return found


def assert_same(shown: Scalars, path: Path, rtol: float) -> None:
    wanted = expected(path)
    assert shown.keys() == wanted.keys()
    for name, by_step in wanted.items():
        assert shown[name].keys() == by_step.keys(), name
        np.testing.assert_allclose([shown[name][s] for s in by_step], list(by_step.values()), rtol=rtol, err_msg=name)


def read_tensorboard(path: Path) -> Scalars:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads events")
    events = accumulator.EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def read_wandb(path: Path) -> Iterator[Any]:
    """Records of an offline run: a log of LevelDB with a header of W&B's own, of blocks of 32 KB."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="reads what W&B wrote")
    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = internal.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_tensorboard_shows_what_the_run_says(tmp_path: Path) -> None:
    def after(tracker: Tracker, step: int) -> None:
        tracker.log(loss=step / 8, accuracy=step / 4)
        if step % 2 == 0:
            tracker.log_eval("eval", loss=1 / step, f1=float("nan"))

    train(tmp_path / "run", after=after, report_to="tensorboard")
    shown = read_tensorboard(tmp_path / "run")
    assert shown["steps/loss"] == {s: s / 8 for s in (1, 2, 3, 4)}  # what was logged, once
    assert shown["evals/eval/loss"] == {2: 0.5, 4: 0.25}
    assert "effective_rank/model.layers.0.self_attn.q_proj" in shown
    assert "grad_norm/model.layers.1.mlp.down_proj/W2" in shown
    assert_same(shown, tmp_path / "run", rtol=1e-6)  # TensorBoard's are of 32 bits
    # What load_run computes from stored spectra is bit for bit what the mirror was given.
    run = expected(tmp_path / "run")
    for column in DERIVED_COLUMNS:
        name = f"{column}/model.layers.0.self_attn.q_proj"
        assert shown[name] == run[name]
    assert not list((tmp_path / "run").glob("mirror-*.log"))  # it had nothing to say


@pytest.mark.parametrize("options", [{"preset": "light"}, {"every": 2}, {"adapter": "lora-4"}])
def test_tensorboard_shows_it_also_of_other_runs(tmp_path: Path, options: dict[str, Any]) -> None:
    train(tmp_path / "run", report_to=["tensorboard"], **options)
    assert_same(read_tensorboard(tmp_path / "run"), tmp_path / "run", rtol=1e-6)


def test_modules_are_thinned_after_a_while_and_steps_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "NUM_WHOLE_STEPS", 3)
    train(tmp_path / "run", num_steps=21, report_to="tensorboard")
    shown = read_tensorboard(tmp_path / "run")
    assert list(shown["steps/grad_norm"]) == list(range(1, 22))
    assert list(shown["delta_norm/model.layers.0.self_attn.q_proj"]) == [1, 2, 3, 10, 20]
    assert list(shown["weight_norm/model.layers.0.self_attn.q_proj/A"]) == [1, 2, 3, 10, 20]


def test_a_resumed_training_goes_on_in_the_same_event_files(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def steps(first: int, last: int) -> None:
        with Tracker(model, optimizer, tmp_path / "run", strict=True, quiet=True, report_to="tensorboard"):
            for seed in range(first, last + 1):
                optimizer.zero_grad()
                model(**small_models.batch("llama", seed=seed)).loss.backward()
                optimizer.step()
                if seed == 3:
                    kept.append({"model": {n: p.clone() for n, p in model.state_dict().items()}})
                    kept[0]["optimizer"] = {
                        "state": {
                            i: {n: v.clone() for n, v in s.items()} for i, s in optimizer.state_dict()["state"].items()
                        },
                        "param_groups": optimizer.state_dict()["param_groups"],
                    }

    kept: list[dict[str, Any]] = []
    steps(1, 5)
    model.load_state_dict(kept[0]["model"])
    optimizer.load_state_dict(kept[0]["optimizer"])
    time.sleep(1.1)  # event files are named by the second
    steps(11, 12)  # other data than before
    shown = read_tensorboard(tmp_path / "run")
    assert list(shown["steps/loss"]) == [1, 2, 3, 4, 5]
    assert_same(shown, tmp_path / "run", rtol=1e-6)


@pytest.mark.slow
def test_wandb_shows_what_the_run_says_beside_the_script_s_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the mirror is into W&B")
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path[:0] = {HERE!r}\n"
        "import os, random, signal, wandb, test_mirrors\n"
        "from pathlib import Path\n"
        "here = Path(sys.argv[1])\n"
        "mine = wandb.init(project='mine', mode='offline', dir=str(here / 'mine'),\n"
        "    settings=wandb.Settings(silent=True, x_disable_stats=True))\n"
        "def state(): return dict(os.environ), random.getstate(), signal.getsignal(signal.SIGINT), sys.excepthook\n"
        "before = state()\n"
        "test_mirrors.train(here / 'run', report_to='wandb', after=lambda tracker, step: wandb.log({'mine': step}))\n"
        "assert state() == before and wandb.run is mine\n"
        "mine.finish()\n"
    )
    (tmp_path / "mine").mkdir()
    environment = {n: v for n, v in os.environ.items() if not n.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}  # nobody is logged in
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    shown: Scalars = {}
    project, num_rows = "", 0
    for record in read_wandb(tmp_path / "run"):
        project = project or record.run.project
        row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        num_rows += bool(row)
        for name in row.keys() - {"linchain_step", "_step", "_timestamp", "_runtime"}:
            shown.setdefault(name, {})[int(row["linchain_step"])] = float(json.loads(row[name]))
    assert (project, num_rows) == ("mine", 4)
    assert_same(shown, tmp_path / "run", rtol=1e-6)
    own = [record.history for record in read_wandb(tmp_path / "mine") if record.history.item]
    assert [{item.key or item.nested_key[0] for item in row.item} for row in own] == [
        {"mine", "_step", "_timestamp", "_runtime"}
    ] * 4
    assert "wandb sync" in (tmp_path / "run" / "mirror-wandb.log").read_text()


def test_trackio_shows_what_the_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio", reason="the mirror is into Trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    train(tmp_path / "run", report_to="trackio")
    assert capfd.readouterr().out == ""
    with sqlite3.connect(tmp_path / "store" / "linchain_analysis.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics").fetchall()
    shown: Scalars = {}
    for name, step, metrics in rows:
        assert name == "run"
        for key, value in json.loads(metrics).items():
            shown.setdefault(key, {})[step] = value
    assert_same(shown, tmp_path / "run", rtol=1e-6)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A stand-in for Trackio that fails where it is told to; returns where it writes what it was given."""

    def make(fail_at: str = "", slow: float = 0.0) -> Path:
        folder = tmp_path / "fakes" / "trackio"
        folder.mkdir(parents=True)
        log = tmp_path / "rows.jsonl"
        (folder / "__init__.py").write_text(FAKE.format(fail_at=fail_at, slow=slow, log=str(log)))
        monkeypatch.delitem(sys.modules, "trackio", raising=False)
        monkeypatch.syspath_prepend(folder.parent)
        return log

    return make


@pytest.mark.parametrize(
    ("fail_at", "reason"),
    [
        ("init", "PermissionError: not on this machine"),
        ("log", "OSError: no space left on the device"),
        ("finish", "ConnectionError: the server has gone"),
    ],
)
@pytest.mark.parametrize("num_steps", [2, 60])
def test_a_mirror_that_fails_is_left_out_and_said_once(
    fake: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fail_at: str,
    reason: str,
    num_steps: int,
) -> None:
    fake(fail_at)

    def after(tracker: Tracker, step: int) -> None:
        tracker.log(accuracy=0.5)
        tracker.log_eval("eval", loss=0.5)
        if num_steps > 2:
            time.sleep(0.02)  # so that it fails while training goes on

    with caplog.at_level(logging.WARNING, logger="linchain_analysis"):
        train(tmp_path / "run", num_steps=num_steps, after=after, report_to="trackio", strict=False)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert "the mirror to trackio" in said[0]
    assert reason in said[0]
    run = load_run(tmp_path / "run")
    assert (run.status, len(run.steps), run.modules["step"].nunique()) == ("complete", num_steps, num_steps)


def test_a_mirror_that_hangs_ends_the_run_in_bounded_time(
    fake: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake("hang")
    monkeypatch.setattr(mirrors, "_CLOSE_SECONDS", 2.0)
    opened: list[Feed] = []
    monkeypatch.setattr(mirrors, "Feed", lambda *given: opened.append(Feed(*given)) or opened[-1])
    begun = time.monotonic()
    train(tmp_path / "run", report_to="trackio", strict=False)
    assert time.monotonic() - begun < 10
    assert "goes on by itself" in caplog.text
    assert load_run(tmp_path / "run").status == "complete"
    opened[0]._process.kill()
    opened[0]._process.wait()


def test_a_slow_mirror_does_not_hold_up_training_and_loses_nothing(fake: Callable[..., Path], tmp_path: Path) -> None:
    log = fake(slow=0.1)
    ends: list[float] = []
    train(
        tmp_path / "run", num_steps=20, report_to="trackio", after=lambda tracker, step: ends.append(time.monotonic())
    )
    assert np.diff(ends).max() < 1  # twenty of its rows take two seconds
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step for step, _ in rows] == list(range(1, 21))
    assert "noise of the package" in (tmp_path / "run" / "mirror-trackio.log").read_text()


def test_a_process_that_takes_nothing_costs_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import pickle, sys, time\n"
        "def main():\n"
        "    time.sleep(1)\n"
        "    try:\n"
        "        while True: print(pickle.load(sys.stdin.buffer)[0])\n"
        "    except EOFError: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("linchain_analysis.tracking.feed._MOST_BYTES", 200_000)
    feed = Feed("sleeper", "sleeper", tmp_path / "log", os.environ)
    begun = time.monotonic()
    for number in range(100):
        feed.send((number, b"." * 10_000))
    assert time.monotonic() - begun < 0.8
    assert feed._num_bytes <= 200_000
    feed.close(20.0)
    taken = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert taken == list(range(100 - feed.num_left_out))  # each whole, in order
    assert 0 < feed.num_left_out < 90


def test_training_is_bit_identical_with_mirrors(fake: Callable[..., Path], tmp_path: Path) -> None:
    fake()
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)  # noqa: NPY002
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    mirrored = train(tmp_path / "run", num_steps=6, report_to="tensorboard,trackio")
    generator = torch.get_rng_state()
    after = random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)  # noqa: NPY002
    assert before == after
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    plain = train(None, num_steps=6)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(weight, plain[name]) for name, weight in mirrored.items())


def test_names_may_be_many_and_each_is_opened_once() -> None:
    pytest.importorskip("tensorboard", reason="has to be found")
    assert check_mirrors(()) == ()
    assert check_mirrors(["tensorboard", "tensorboard"]) == ("tensorboard",)
    assert check_mirrors("tensorboard, tensorboard") == ("tensorboard",)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="report_to: expected one of tensorboard, wandb, trackio, got 'mlflow'"):
        check_mirrors("mlflow")


def test_a_package_that_is_missing_is_said_and_a_folder_of_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # as an earlier run leaves it
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(InputError, match=f"expected {name} to be installed.*linchain-analysis\\[mirrors\\]"):
            check_mirrors(name)


def test_the_launcher_mirrors_too_and_the_script_s_output_stays_its_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the mirror is into TensorBoard")
    (tmp_path / "train.py").write_text(
        "import os, torch\nfrom peft import LoraConfig, get_peft_model\n"
        "torch.manual_seed(0)\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), LoraConfig(r=2, target_modules=['0']))\n"
        "optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)\n"
        "os.chdir('/')\n"
        "for _ in range(3):\n"
        "    optimizer.zero_grad()\n"
        "    loss = model(torch.randn(5, 6)).square().mean()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "    print(loss.item())\n"
    )
    command = [sys.executable, "-m", "linchain_analysis.track", "--out", "run", "--report-to"]
    done = subprocess.run(
        [*command, "tensorboard", "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shown = read_tensorboard(tmp_path / "run")
    np.testing.assert_allclose(list(shown["steps/loss"].values()), [float(x) for x in done.stdout.split()], rtol=1e-6)
    assert_same(shown, tmp_path / "run", rtol=1e-6)
    refused = subprocess.run([*command, "mlflow", "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "report_to: expected one of" in refused.stderr


def test_what_was_handed_over_is_kept_when_the_training_is_killed(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {HERE!r}\n"
        "import os, time, test_mirrors\nfrom pathlib import Path\n"
        "def after(tracker, step):\n    time.sleep(0.2)\n    if step == 9: os.kill(os.getpid(), 9)\n"
        "test_mirrors.train(Path(sys.argv[1]), num_steps=10, report_to='tensorboard', after=after)\n"
    )
    pytest.importorskip("tensorboard", reason="the mirror is into TensorBoard")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    for _ in range(100):
        shown = read_tensorboard(tmp_path / "run")
        if len(shown.get("steps/loss", {})) >= 7:
            break
        time.sleep(0.1)
    assert list(shown["steps/loss"]) == list(range(1, 8))  # the last two were held
