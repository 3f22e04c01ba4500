import hashlib
import subprocess
from pathlib import Path

import pytest

from linchain_analysis.analysis.provenance import checksum, describe_commit, describe_origin, describe_runs
from linchain_analysis.runs import Manifest, RunWriter, load_run


def test_a_checksum_follows_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "adapter").mkdir()
    lines = "".join(f"{name}\0{hashlib.sha256(text).hexdigest()}\n" for name, text in (("a", b"1"), ("b", b"2")))
    assert checksum(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "b").rename(tmp_path / "c")
    assert checksum(tmp_path) != hashlib.sha256(lines.encode()).hexdigest()


def test_paths_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    RunWriter(tmp_path / "runs" / "one", Manifest(("train",), method="lora-16", init_seed=3)).close()
    (found,) = describe_runs([load_run(tmp_path / "runs" / "one")])
    assert (found["path"], found["method"], found["init_seed"]) == ("../runs/one", "lora-16", 3)
    assert found["sha256"] == checksum(tmp_path / "runs" / "one")


def test_commit_and_changes_of_a_repository(tmp_path: Path) -> None:
    assert describe_commit(tmp_path / "missing") is None
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    found = describe_commit(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert not found["changed"]
    (tmp_path / "file").write_text("x")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    changed = describe_commit(tmp_path)
    assert changed is not None
    assert changed["changed"]


def test_the_date_can_be_fixed_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    origin = describe_origin(["figures", "runs"], [])
    assert origin["date"] == "1970-01-02T00:00:00+00:00"
    assert origin["command"] == ["figures", "runs"]
    assert origin["packages"]["numpy"]
