"""Unchanged scripts under `python -m linchain_analysis.track`, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from linchain_analysis import load_run

SCRIPT = """
import argparse, sys
import torch
from torch.nn.utils import clip_grad_norm_
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="the script's own option")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--exit", type=int)
args = parser.parse_args()

def main():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=48))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(args.steps):
        x = torch.randint(0, 48, (2, 8))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1e-3)
        print(repr(loss.item()), repr(norm.item()), flush=True)
        optimizer.step()
        optimizer.zero_grad()
    if args.fail:
        raise RuntimeError("the script's own failure")
    if args.exit is not None:
        sys.exit(args.exit)

if __name__ == "__main__":
    print(sys.argv[1:], flush=True)
    main()
"""


def launch(folder: Path, *arguments: str, tracked: bool = True, out: str = "run") -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    tracker = ["-m", "linchain_analysis.track", "--out", out] if tracked else []
    return subprocess.run(
        [sys.executable, *tracker, "train.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_script_runs_as_without_and_is_tracked_from_its_first_step(tmp_path: Path) -> None:
    plain = launch(tmp_path, "--out", "mine", tracked=False)
    tracked = launch(tmp_path, "--out", "mine")
    assert (tracked.returncode, tracked.stdout) == (0, plain.stdout)
    assert tracked.stdout.startswith("['--out', 'mine']")
    printed = np.array([[float(word) for word in line.split()] for line in tracked.stdout.splitlines()[1:]])
    run = load_run(tmp_path / "run")
    assert run.status == "complete"
    np.testing.assert_allclose(run.steps[["loss", "grad_norm"]], printed, rtol=1e-6)
    np.testing.assert_allclose(run.steps["clip_coef"], 1e-3 / (printed[:, 1] + 1e-6), rtol=1e-5)
    assert run.modules["module"].unique().tolist() == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert run.modules["step"].nunique() == 3
    assert run.manifest.command[1:] == ("--out", "mine")


def test_exit_status_and_traceback_are_the_script_s_own(tmp_path: Path) -> None:
    plain = launch(tmp_path, "--fail", tracked=False)
    failed = launch(tmp_path, "--fail")
    assert failed.returncode == plain.returncode == 1
    assert plain.stderr.splitlines()[-1] in failed.stderr
    assert "the script's own failure" in failed.stderr
    assert "launcher.py" not in failed.stderr
    run = load_run(tmp_path / "run")
    assert (run.status, len(run.steps)) == ("failed", 3)
    assert launch(tmp_path, "--exit", "7", out="seven").returncode == 7
    assert len(load_run(tmp_path / "seven").steps) == 3


SEVERAL = """
import os, sys, torch
from torch.nn.utils import clip_grad_norm_
from peft import LoraConfig, get_peft_model

def f(x: int): ...

assert f.__annotations__ == {"x": int}  # no future statement of the launcher's

def main():
    os.chdir("/")
    open(__file__).close()
    assert sys.modules["__main__"].__file__ == __file__
    for k in range(3):
        torch.manual_seed(k)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 6)).square().mean()
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            print(k, repr(loss.item()), repr(norm.item()))
    print(sys.argv[0])

main()
"""


def test_each_optimiser_has_a_run_of_its_own_whole_from_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(SEVERAL)
    done = subprocess.run(
        [sys.executable, "-m", "linchain_analysis.track", "--out", "run", "several.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *rows, argv0 = done.stdout.splitlines()
    assert argv0 == "several.py"
    printed = np.array([[float(word) for word in row.split()] for row in rows])
    for k, name in enumerate(["run", "run-2", "run-3"]):
        steps = load_run(tmp_path / name).steps
        np.testing.assert_allclose(steps[["loss", "grad_norm"]], printed[printed[:, 0] == k][:, 1:], rtol=1e-6)
        assert (steps["clip_coef"] < 1).all()


def test_an_interrupted_script_ends_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import time, torch\nprint('ready', flush=True); time.sleep(100)\n")
    outcomes = []
    for tracker in ([], ["-m", "linchain_analysis.track", "--out", "run"]):
        process = subprocess.Popen(
            [sys.executable, *tracker, "wait.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        # Where in its line the interrupt came is chance.
        shown = [line for line in err.splitlines() if "linchain_analysis:" not in line and set(line) - set(" ~^")]
        outcomes.append((process.returncode, shown))
    assert outcomes[0] == outcomes[1]


def test_a_killed_script_keeps_its_steps(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-m", "linchain_analysis.track", "--out", "run", "train.py", "--steps", "100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    live = load_run(tmp_path / "run")  # another process, while it is being written
    assert live.status == "running"
    assert len(live.steps) >= 15
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    seen = 20 + len(process.stdout.read().splitlines()) - 1  # the first line is no step
    run = load_run(tmp_path / "run")
    assert seen - 2 <= len(run.steps) <= seen
    assert run.steps["step"].tolist() == list(range(1, len(run.steps) + 1))
    assert len(run.modules) == 2 * len(run.steps)


def test_a_module_runs_too_and_a_script_without_adapters_runs_on(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("import sys, torch\nprint(sys.argv[1:], __name__)\n")
    done = subprocess.run(
        [sys.executable, "-m", "linchain_analysis.track", "-m", "plain", "-x", "--", "--preset"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "['-x', '--', '--preset'] __main__\n")
    assert "nothing was tracked" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "expected a Python file, got missing.py"),
        (["--preset", "light-ish", "train.py"], "did you mean 'light'"),
        (["--every", "0", "train.py"], "every: expected"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_said_before_the_script_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        [sys.executable, "-m", "linchain_analysis.track", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert message in done.stderr
