"""Ten thousand steps: memory and cost stay what they were, and the log is complete."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_training

from linchain_analysis import load_run

NUM_STEPS = 10_000
SCRIPT = """
import gc, json, resource
model = build()
optimizer = optimize(model, lr=1e-4)
seen = []
with Tracker(model, optimizer, "run", quiet=True) as tracker:
    for number in range(1, int(sys.argv[1]) + 1):
        train_step(model, optimizer, number)
        if number % 1000 == 0:
            gc.collect()
            size = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
            seen.append([number, size, len(gc.get_objects()), len(os.listdir("/proc/self/fd"))])
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read there")
def test_ten_thousand_steps(tmp_path: Path) -> None:
    process = small_training.start(SCRIPT, tmp_path, str(NUM_STEPS))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    steps, size, objects, files = np.array(json.loads(out)).T
    print("MB", (size / 2**20).round(1).tolist(), "objects", objects.tolist(), "files", files.tolist())
    assert steps[0] == 1000 and steps[-1] == NUM_STEPS
    np.testing.assert_allclose(size, size[0], rtol=0.05)
    # What Python keeps grows by nothing but chance.
    assert objects[-1] - objects[0] < 100
    assert files[-1] == files[0]

    run = load_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(1, NUM_STEPS + 1))
    pairs = run.modules.groupby("module", observed=True)["step"]
    assert len(pairs) == 2
    for _, found in pairs:
        assert found.tolist() == list(range(1, NUM_STEPS + 1))
    assert len(run.factors) == 8 * NUM_STEPS
    assert run.modules["spectrum"].notna().all()

    # A busy machine makes single steps slow, never fast: the quickest tenth of each tenth of the run tells.
    tenths = np.quantile(run.steps["track_seconds"].to_numpy().reshape(10, -1), 0.1, axis=1)
    print("ms", (1e3 * tenths).round(3).tolist())
    assert abs(tenths[-1] / tenths[1] - 1) < 0.15
