"""The door `python -m linchain_analysis.watch`, as a process of its own and in a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs
from watching.test_following import FACTORS, MODULES, add_finding, kill, write_step

from linchain_analysis.runs import RunWriter, load_run

TESTS = Path(__file__).parents[1]
WATCH = [sys.executable, "-m", "linchain_analysis.watch"]
GROW = """
import sys, time
import small_runs
from pathlib import Path
from linchain_analysis.runs import RunWriter
time.sleep(float(sys.argv[2]))
writer = RunWriter(Path(sys.argv[1]), small_runs.manifest(num_steps=40))
for step in range(1, 41):
    small_runs.append_step(writer, step)
    time.sleep(0.05)
writer.close()
"""


def watch(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WATCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@contextlib.contextmanager
def growing(path: Path, *, after: float = 0.0) -> Iterator[None]:
    """Another process that writes 40 steps in some two seconds."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, "-c", GROW, str(path), str(after)], env=environment) as process:
        yield
        assert process.wait(60) == 0


def watch_in_terminal(
    *arguments: str | Path, columns: int = 80, lines: int = 24, interrupt_at: str | None = None, **environment: str
) -> tuple[int, str]:
    """Run the door in a terminal, press Ctrl-C when it has said something, and return its exit code and output."""
    child, terminal = pty.fork()
    if not child:
        environment = {"TERM": "xterm", **environment}
        own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execve(WATCH[0], [*WATCH, *map(str, arguments)], {**own, **environment})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            break
        output += data
        if interrupt_at is not None and interrupt_at.encode() in output:
            os.write(terminal, b"\x03")
            interrupt_at = None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode()


def last_frame(output: str) -> list[str]:
    """What is left on the screen, without colours: the lines after the last time that the cursor went up."""
    frame = re.split(r"\x1b\[1A\x1b\[2K(?!.*\x1b\[1A)", output, flags=re.DOTALL)[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).splitlines()]


def test_one_frame_of_a_live_run(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", small_runs.manifest(num_steps=20, problem="sums", modules=MODULES))
    for step in range(1, 13):
        write_step(writer, step)
    add_finding(writer, 10, "no_gradient")
    done = watch("--once", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "moslora-2", "on", "sums", "running"]
    assert len(lines[0]) == 80
    run = load_run(tmp_path / "run")
    ranks = run.modules[run.modules["step"] == 12].groupby("kind", observed=True)["effective_rank"]
    low, median, high = ranks.min()["q_proj"], ranks.median()["q_proj"], ranks.max()["q_proj"]
    for start in (
        "step         12 of 20  ━",
        f"loss         {run.steps['loss'].iloc[-1]:.4g}   mean of 12: {run.steps['loss'].mean():.4g}   lr 8.33e-05",
        "health       no_gradient since step 10: no_gradient 10",
        f"q_proj      {median:8.2f}  {low:5.2f} – {high:5.2f}  ",
    ):
        assert any(line.startswith(start) for line in lines), (start, done.stdout)
    last = run.factors[run.factors["step"] == 12]
    ratios = last.groupby(["kind", "factor"], observed=True)["update_ratio"].median()
    expected = [f"{ratios['up_proj', factor]:.1e}" for factor in FACTORS["up_proj"]]
    assert lines[-1].split()[-4:] == expected


def test_it_ends_by_itself_where_stdout_is_no_terminal(tmp_path: Path) -> None:
    writer = small_runs.write_run(tmp_path / "run", close=False)
    assert "running" in watch(tmp_path / "run").stdout
    assert "running" in watch(tmp_path / "run", FORCE_COLOR="1").stdout
    kill(writer)
    done = watch(tmp_path / "run")
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "its process is gone")


@pytest.mark.slow
def test_complete_failed_and_damaged_runs(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "a")
    writer = small_runs.write_run(tmp_path / "b", close=False)
    writer.close("failed", "out of\nmemory")
    small_runs.write_run(tmp_path / "c", close=False)
    (tmp_path / "c" / "steps.arrows").write_bytes(b"no stream at all")
    assert "complete" in watch("--once", tmp_path / "a").stdout
    failed = watch("--once", tmp_path / "b")
    assert failed.stdout.splitlines()[1] == "out of memory"
    damaged = watch("--once", tmp_path / "c")
    assert (damaged.returncode, damaged.stderr) == (2, "")
    assert damaged.stdout.splitlines()[1].startswith("steps.arrows: no stream")
    together = watch("--once", tmp_path)
    assert together.returncode == 0
    assert sum("complete" in line or "failed" in line for line in together.stdout.splitlines()) == 2


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no run")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        done = watch("--once", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"Error: {path}: expected a")
    assert watch_in_terminal(tmp_path / "file")[0] == 2


def test_many_runs_are_a_table(tmp_path: Path) -> None:
    for number in range(6):
        small_runs.write_run(tmp_path / f"seed-{number}", number + 1, started=f"2026-01-0{number + 1}")
    writer = RunWriter(tmp_path / "now", small_runs.manifest(num_steps=9, modules=MODULES))
    for step in range(1, 4):
        write_step(writer, step)
    lines = watch("--once", tmp_path).stdout.splitlines()
    assert lines[0] == "7 runs: 1 running, 6 complete"
    assert [line.split()[0] for line in lines[2:9]] == ["now", *(f"seed-{number}" for number in range(5, -1, -1))]
    assert lines[2].split()[1:5] == ["running", "3", "of", "9"]
    writer.close()


def test_a_terminal_without_unicode_gets_ascii(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    for encoding in ("ascii", "latin-1"):
        done = watch("--once", tmp_path / "run", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
        assert "eff. rank" in done.stdout


def test_it_loads_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    code = (
        "import sys; from typer.testing import CliRunner; from linchain_analysis.watch import app;"
        f"assert CliRunner().invoke(app, ['--once', {str(tmp_path / 'run')!r}]).exit_code == 0;"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("columns", [60, 100])
def test_it_waits_for_a_run_follows_it_and_ends_with_it(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "run"
    with growing(path, after=0.5):
        code, output = watch_in_terminal(path, "--refresh", "0.1", columns=columns)
    assert code == 0
    assert "no run in" in output
    assert "run yet; waiting, Ctrl-C ends" in output
    assert "Traceback" not in output
    assert len(set(re.findall(r"(\d+) of 40", output))) > 5
    frame = last_frame(output)
    assert frame[0].endswith("complete")
    assert frame[1].startswith("step         40 of 40")
    assert max(map(len, frame)) <= columns
    # No other screen, no mouse, and the cursor is there again.
    assert not re.search(r"\x1b\[\?(1049|47|1000|1006)", output)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_ctrl_c_ends_it_and_leaves_the_run_alone(tmp_path: Path) -> None:
    def stand(path: Path) -> dict[str, tuple[int, int]]:
        return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir()}

    writer = small_runs.write_run(tmp_path / "run", close=False)
    before = stand(tmp_path / "run")
    code, output = watch_in_terminal(tmp_path / "run", "--refresh", "0.2", interrupt_at="eff. rank")
    assert (code, "Traceback" in output, "Abort" in output) == (0, False, False)
    assert "\x1b[?25h" in output
    assert stand(tmp_path / "run") == before
    small_runs.append_step(writer, 4)
    writer.close()
    assert load_run(tmp_path / "run").num_steps == 4
    code, output = watch_in_terminal(tmp_path / "none", interrupt_at="no run in")
    assert (code, "Traceback" in output) == (0, False)


def test_a_dumb_terminal_gets_lines_and_a_last_frame(tmp_path: Path) -> None:
    with growing(tmp_path / "run"):
        while not (tmp_path / "run" / "steps.arrows").exists():
            time.sleep(0.01)
        code, output = watch_in_terminal(tmp_path / "run", "--refresh", "0.2", TERM="dumb")
    assert code == 0
    assert "\x1b" not in output
    assert output.splitlines()[0].startswith("run: ")
    assert "step         40 of 40" in output


def test_no_colour_where_none_is_wanted(tmp_path: Path) -> None:
    small_runs.write_run(tmp_path / "run")
    assert "\x1b[36m" in watch_in_terminal(tmp_path / "run")[1]
    output = watch_in_terminal(tmp_path / "run", NO_COLOR="1")[1]
    assert not re.search(r"\x1b\[[0-9;]*3\dm", output)
    assert "eff. rank" in output
