"""How controls are found and named, and how what they found is kept."""

from __future__ import annotations

import json
import math
import re
import types
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from linchain_analysis.controls import Control, Finding, registry
from linchain_analysis.controls.findings import FILE, add_finding, describe_finding, read_findings, recorded_seconds
from linchain_analysis.errors import InputError
from linchain_analysis.plots.drawn import Drawn

OWN = ["acceleration", "balance", "completion", "edge", "few-examples"]


def make_finding(passed: bool = True, value: float = 1.5) -> Finding:
    figure = Figure()
    figure.subplots().plot([0, 1], [0, value])
    table = pd.DataFrame({"x": [0, 1]})
    return Finding(passed, f"The value is {value:g}.", {"value": value}, table, Drawn(figure, table, "A line.", ()))


def make_control(name: str = "fake", **options: object) -> Control:
    return Control(
        name,
        "A fake",
        "It is so.",
        "Nobody 2020, arXiv 2001.00001",
        "value > 1",
        "Nothing was changed after first results.",
        lambda: make_finding(**options),
    )


def test_every_control_says_what_it_must() -> None:
    found = registry.all_controls()
    assert list(found) == sorted(found)
    assert set(OWN) <= set(found)
    assert len(found) >= 6
    for name, control in found.items():
        assert control.name == name
        assert re.search(r"arXiv \d{4}\.\d{4,5}", control.source), name
        assert re.search(r"\d", control.criterion), name
        for words in (control.claim, control.criterion, control.history):
            assert words.endswith("."), name
            assert "\n" not in words


def test_controls_are_found_by_name_once_each() -> None:
    assert [control.name for control in registry.find_controls(["edge", "balance", "edge"])] == ["edge", "balance"]
    assert [control.name for control in registry.find_controls([])] == list(registry.all_controls())
    with pytest.raises(InputError, match="got 'balanc'; did you mean 'balance'"):
        registry.find_controls(["edge", "balanc"])


@pytest.mark.parametrize(
    ("name", "meant"), [("lora+", "lora-plus"), ("LoRA+", "lora-plus"), ("loraplus", "lora-plus"), ("rsLoRA", "rslora")]
)
def test_the_name_that_the_source_uses_leads_to_the_control(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        registry.find_controls([name])


@pytest.mark.parametrize("wrong", [make_control("Two Words"), make_control("edge"), "no control"])
def test_a_file_with_another_control_is_refused(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.importlib.import_module

    def load(name: str) -> object:
        module = real(name)
        if name.endswith(".intervals"):
            module = types.SimpleNamespace(__name__=name, CONTROL=wrong)
        return module

    monkeypatch.setattr(registry.importlib, "import_module", load)
    # Without the cache. Of two files with one name the later is refused, and `edge` comes before `intervals`.
    with pytest.raises(InputError, match=r"controls\.intervals: expected CONTROL"):
        registry.all_controls.__wrapped__()


def test_findings_of_several_calls_stand_together(tmp_path: Path) -> None:
    first, second = make_control("one"), make_control("two")
    add_finding(tmp_path, "two", describe_finding(second, make_finding(), 2.345))
    add_finding(tmp_path, "one", describe_finding(first, make_finding(False, math.nan), 1.0))
    add_finding(tmp_path, "two", describe_finding(second, make_finding(value=3.0), 4.0))
    found = read_findings(tmp_path)
    assert list(found) == ["one", "two"]
    assert found["two"]["measured"] == {"value": 3.0}
    assert found["two"]["seconds"] == 4.0
    assert found["one"]["measured"] == {"value": None}
    assert found["one"]["passed"] is False
    assert found["one"]["criterion"] == "value > 1"
    assert found["one"]["caption"] == "A line."
    assert found["one"]["history"] == "Nothing was changed after first results."
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_the_later_folder_knows_better_how_long_a_control_takes(tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    for folder in (early, late):
        folder.mkdir()
    for folder, name, seconds in ((early, "one", 2.0), (early, "two", 3.0), (late, "two", 5.0)):
        add_finding(folder, name, describe_finding(make_control(name), make_finding(), seconds))
    assert recorded_seconds([early, tmp_path / "none", late]) == {"one": 2.0, "two": 5.0}
    assert recorded_seconds([late, early]) == {"one": 2.0, "two": 3.0}
    assert recorded_seconds([tmp_path / "none"]) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"one": 1}'])
def test_a_file_that_is_no_findings_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match=FILE):
        add_finding(tmp_path, "one", {"passed": True})
    assert (tmp_path / FILE).read_text() == text
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_findings(tmp_path / "none")


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    add_finding(tmp_path, "one", describe_finding(make_control(), make_finding(value=math.inf), 1.0))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / FILE).read_text(encoding="utf-8"), parse_constant=refuse)
