"""Scripts see under the launcher what they see under plain `python`: each runs as a process both ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRACK = ("-m", "linchain_analysis.track")


def run(folder: Path, *command: str, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    err = [line for line in done.stderr.splitlines() if not line.startswith("linchain_analysis: ")]
    return done.returncode, done.stdout, re.sub(r"0x[0-9a-f]+", "0x", "\n".join(err))


def assert_alike(folder: Path, *command: str, flags: tuple[str, ...] = (), stdin: str = "") -> tuple[int, str, str]:
    plain = run(folder, *flags, *command, stdin=stdin)
    tracked = run(folder, *flags, *TRACK, *command, stdin=stdin)
    assert tracked == plain
    return plain


SEEN = """
import sys, os
from beside import NAME
main = sys.modules["__main__"]
print(NAME, __name__, sorted(vars()), sys.argv, sys.path[:2], main.__dict__ is globals())
print(__file__, repr(__package__), __spec__ and __spec__.name, __cached__, __doc__, type(__loader__).__name__)
print(__annotations__, type(__builtins__), os.getcwd(), sys.flags, sys.warnoptions)
"""


@pytest.mark.parametrize("flags", [(), ("-P",), ("-W", "error", "-X", "dev", "-u")])
def test_what_a_script_sees_of_itself(tmp_path: Path, flags: tuple[str, ...]) -> None:
    for name in ("beside", "package/__init__", "package/beside", "package/inner/__init__"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}\n")
    for name in ("seen", "package/__main__", "package/other", "package/inner/deep"):
        (tmp_path / f"{name}.py").write_text(SEEN if name == "seen" else SEEN.replace("beside", "package.beside"))
    (tmp_path / "link.py").symlink_to(tmp_path / "package" / "other.py")
    commands = [["seen.py", "--out", "x", "--", "-m"], ["-m", "package.other", "-x"]]
    if not flags:
        commands += [["./seen.py"], ["package/other.py"], ["link.py"], ["-m", "package"], ["-m", "package.inner.deep"]]
    for command in commands:
        code, out, _ = assert_alike(tmp_path, *command, flags=flags)
        # These look for `package` where it is not to be found, both ways.
        lost = flags == ("-P",) or command[0] in ("link.py", "package/other.py")
        assert (code != 0) == lost, (command, out)


SCRIPTS = {
    "nothing": "",
    "exit_none": "import sys; sys.exit()",
    "exit_three": "raise SystemExit(3)",
    "exit_text": "import sys; sys.exit('that is why')",
    "exit_hard": "import os; print('out', flush=True); os._exit(5)",
    "reads": "print(input('name? '), __import__('sys').stdin.read().splitlines())",
    "syntax": "print('x'\nif",
    "future": "from __future__ import annotations\ndef f(x: int): ...\nprint(f.__annotations__)",
    "latin": "# -*- coding: latin-1 -*-\nprint(len('é'))",
    "exits_in_atexit": "import atexit, sys; X = 1; atexit.register(lambda: print(sys.modules['__main__'].X))",
    "own_hook": "import sys\nsys.excepthook = lambda k, e, t: print('hook', k, e, t.tb_lineno)\n1 / 0",
    "chained": "def f():\n    1 / 0\ntry:\n    f()\nexcept Exception as e:\n    raise ValueError('second') from e",
    "in_context": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    {}['key']",
    "source": (
        "import inspect, dataclasses, pickle\n@dataclasses.dataclass\nclass Point:\n"
        "    x: int = 1\n    y: 'list[int]' = dataclasses.field(default_factory=list)\n"
        "print(inspect.getsource(Point), pickle.loads(pickle.dumps(Point())), inspect.getfile(Point))\n"
    ),
    "warns": "import warnings\nwarnings.warn('watch out')\n",
    "thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()\nprint('end')"
    ),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(2)\nprint(pool.submit(lambda: 6 * 7).result())\n"
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_how_a_script_runs_and_ends(tmp_path: Path, name: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPTS[name], encoding="latin-1" if name == "latin" else "utf-8")
    assert_alike(tmp_path, "script.py", stdin="Ada\none\ntwo\n")


def test_modules_that_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import package.part")
    (tmp_path / "package" / "part.py").write_text("1 / 0 if __name__ == '__main__' else None")
    assert_alike(tmp_path, "-m", "no_such_module")
    assert_alike(tmp_path, "-m", "package")  # it has no __main__
    assert_alike(tmp_path, "-m", "package.part")  # and a warning that it was imported before


WORKERS = """
import sys, torch, torch.multiprocessing as mp
from dataclasses import dataclass
from torch.utils.data import DataLoader, Dataset

@dataclass
class Item:
    value: int

class Numbers(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return Item(index * index)

def collate(items):
    return Item(sum(item.value for item in items))

if __name__ == "__main__":
    torch.save(Item(3), "item.pt")
    print(torch.load("item.pt", weights_only=False), Item.__module__)
    for method in ("fork", "spawn"):
        loader = DataLoader(Numbers(), batch_size=3, num_workers=2, multiprocessing_context=method, collate_fn=collate)
        print(method, list(loader))
    with mp.get_context("spawn").Pool(1) as pool:
        print(pool.map(collate, [[Item(1), Item(2)]]))
"""


def test_worker_processes_find_what_the_script_defines(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    code, out, _ = assert_alike(tmp_path, "script.py")
    assert (code, out.count("Item")) == (0, 6)
    done = run(tmp_path, *TRACK, "-m", "script")
    assert done == (0, out, "")


FAILS_INSIDE = """
import torch
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
def closure():
    loss = model(torch.ones(1, 4)).sum()
    loss.backward()
    return loss
optimizer.step(closure)
def broken():
    try:
        optimizer.step(lambda: closure().unknown)
    except AttributeError:
        torch.ones(1).sum().backward()
broken()
"""


def test_a_failure_inside_what_is_watched_shows_no_frame_of_ours(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILS_INSIDE)
    code, _, err = assert_alike(tmp_path, "script.py")
    assert code == 1
    assert "does not require grad" in err
    assert "has no attribute 'unknown'" in err
