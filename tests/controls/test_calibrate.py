"""The door `python -m linchain_analysis.calibrate`, with small made-up controls, and the page of what was found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from controls.test_registry import make_control, make_finding
from typer.testing import CliRunner

from linchain_analysis import calibrate
from linchain_analysis.calibrate import app
from linchain_analysis.controls import Finding, registry
from linchain_analysis.controls.findings import add_finding, describe_finding, read_findings

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    controls = {"bad": make_control("bad", passed=False, value=0.5), "good": make_control("good")}
    monkeypatch.setattr(registry, "all_controls", lambda: controls)


@pytest.mark.usefixtures("made_up")
def test_a_control_that_passes_leaves_its_files(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["good", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "criterion: value > 1" in done.output
    assert "found: The value is 1.5." in done.output
    assert "1 of 1 passed" in done.output
    names = {"figure.png", "figure.pdf", "drawn.csv", "caption.txt", "provenance.json"}
    assert {file.name for file in (tmp_path / "good").iterdir()} == names
    origin = json.loads((tmp_path / "good" / "provenance.json").read_text(encoding="utf-8"))
    assert origin["control"]["criterion"] == "value > 1"
    assert origin["control"]["history"] == "Nothing was changed after first results."
    assert origin["command"][:3] == ["python", "-m", "linchain_analysis.calibrate"]
    assert read_findings(tmp_path)["good"]["passed"] is True


@pytest.mark.usefixtures("made_up")
def test_one_that_fails_is_the_exit_code_and_stops_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "1 of 2 passed" in done.output
    assert {name: found["passed"] for name, found in read_findings(tmp_path).items()} == {"bad": False, "good": True}


@pytest.mark.usefixtures("made_up")
def test_the_list_runs_nothing_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["--list", "--out", str(tmp_path)])
    assert listed.exit_code == 0
    assert re.findall(r"^\w+", listed.output, flags=re.MULTILINE) == ["bad", "good"]
    assert listed.output.count("history: Nothing was changed after first results.") == 2
    wrong = CliRunner().invoke(app, ["god", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "did you mean 'good'" in wrong.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("made_up")
def test_how_long_a_control_takes_is_said_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    add_finding(kept, "good", describe_finding(make_control("good"), make_finding(), 12.4))
    monkeypatch.setattr(calibrate, "KEPT", kept)
    done = CliRunner().invoke(app, ["good", "bad", "--out", str(out)])
    assert "good: A fake, 1 of 2 (takes about 12 s)\n" in done.output
    assert "bad: A fake, 2 of 2\n" in done.output
    # What this machine took is what counts the next time.
    again = CliRunner().invoke(app, ["good", "--out", str(out)])
    assert "good: A fake, 1 of 1 (takes about 0 s)\n" in again.output
    assert read_findings(kept)["good"]["seconds"] == 12.4


@pytest.mark.usefixtures("made_up")
def test_what_the_page_shows_is_not_written_over_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["good"]).exit_code == 0
    assert read_findings(tmp_path / "runs" / "controls")["good"]["passed"] is True
    assert [folder.name for folder in tmp_path.iterdir()] == ["runs"]


def test_an_interrupt_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Finding:
        raise KeyboardInterrupt

    controls = {name: make_control(name) for name in ("first", "second", "third", "fourth")}
    controls["second"] = dataclasses.replace(controls["second"], run=interrupt)
    monkeypatch.setattr(registry, "all_controls", lambda: controls)
    done = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert done.exit_code == 130
    assert "stopped; finished: first; stopped in the middle of: second; not run: third, fourth" in done.stderr
    assert list(read_findings(tmp_path)) == ["first"]
    done = CliRunner().invoke(app, ["second", "--out", str(tmp_path)])
    assert "stopped; finished: none; stopped in the middle of: second; not run: none" in done.stderr


def test_the_help_says_about_how_long_all_take() -> None:
    minutes = sum(found["seconds"] for found in read_findings(DOCS.parent / "figures" / "controls").values()) / 60
    assert "about six minutes" in " ".join(re.sub("[│╭╰─]", " ", CliRunner().invoke(app, ["--help"]).output).split())
    assert 4 < minutes < 9  # what "about six" may mean


def test_the_page_is_what_was_found() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "make_controls.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_page_says_a_failure_and_what_is_undefined() -> None:
    spec = importlib.util.spec_from_file_location("make_controls", DOCS / "make_controls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = {name: f"The {name} a|b." for name in ("title", "claim", "source", "criterion", "history", "statement")}
    words["caption"] = "Bands are a|b."
    bad = {**words, "passed": False, "measured": {"slope": None}, "seconds": 3.2}
    good = {**words, "passed": True, "measured": {"slope": 1.23456}, "seconds": 1.0}
    page = module.write_page({"bad": bad, "good": good})
    assert "1 of 2 pass." in page
    assert "The title a|b.: **failed**." in page
    assert "Together they took 0.1 minutes" in page  # 4.2 s
    assert "the longest,\nbad, took 3 seconds." in page
    assert page.count("/figure.png)\n\n*Figure.* Bands are a\\|b.\n") == 2
    assert page.count("- **history**: The history a\\|b.") == 2
    assert "| slope | undefined |" in page
    assert "| slope | 1.235 |" in page
    # Nothing of a text may break its row.
    assert "| [bad](#bad) | The claim a\\|b. | failed | 3 |" in page
