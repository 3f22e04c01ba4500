"""How runs look: no wider or higher than the screen, the most important first, all in the terminal's characters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from linchain_analysis.watching.frame import draw_frame
from linchain_analysis.watching.glyphs import ASCII, UNICODE, Glyphs, average_buckets, draw_bar, draw_curve, draw_line
from linchain_analysis.watching.view import NAN, Evaluation, Finding, KindRank, RunView, StepsView
from linchain_analysis.watching.wording import tell_number, tell_speed, tell_time

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "a_kind_with_a_very_long_name")
FACTORS = ("A", "W1", "W2", "W3", "B")
FULL = RunView(
    name="runs/cola",
    status="running",
    method="linchain-3-16",
    problem="cola",
    preset="standard",
    started="2026-01-01T00:00:00+00:00",
    num_steps=5000,
    quiet_seconds=0.1,
    steps=StepsView(
        step=1240,
        num_rows=1240,
        losses=2.0 * np.exp(-np.arange(1240) / 300),
        loss=0.41234,
        loss_mean=0.43211,
        learning_rate=2e-4,
        grad_norm=0.5318,
        clipped_share=0.123,
        num_skipped=3,
        steps_per_second=19.8,
        seconds=63.0,
        track_milliseconds=5.123,
        track_share=0.0231,
    ),
    ranks=tuple(KindRank(kind, 9.81, 8.2, 11.3, np.linspace(3, 10, 1240)) for kind in KINDS),
    rank=9.81,
    ratios={kind: dict.fromkeys(FACTORS, 1.23e-3) for kind in KINDS},
    ratio=1.23e-3,
    is_examined=True,
    findings=(
        Finding(
            "no_gradient", "B of q_proj", 120, "no gradient reaches B of q_proj in 12 of 12 modules; " + "so " * 60
        ),
        Finding("frozen", "A", 10, "no gradient is asked for of A"),
    ),
    evals=(Evaluation("eval", "accuracy", 1200, 0.534), Evaluation("eval", "loss", 1200, 0.61)),
)


def draw(*views: RunView, width: int = 80, height: int | None = None, glyphs: Glyphs = UNICODE) -> list[str]:
    console = Console(width=width, height=25, force_terminal=False)
    with console.capture() as captured:
        console.print(draw_frame(views, width, height, glyphs))
    return captured.get().splitlines()


def many(count: int) -> list[RunView]:
    return [replace(FULL, name=f"grid/run-{number}", started=f"2026-01-{number + 1:02}") for number in range(count)]


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
@pytest.mark.parametrize("num_runs", [1, 2, 4, 5, 25])
@pytest.mark.parametrize("height", [None, 3, 10, 20, 50])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_frame_fits_the_screen(width: int, height: int | None, num_runs: int, glyphs: Glyphs) -> None:
    lines = draw(*many(num_runs), width=width, height=height, glyphs=glyphs)
    assert max(len(line) for line in lines) <= width
    assert height is None or len(lines) <= height
    if glyphs is ASCII:
        assert "\n".join(lines).isascii()


def test_a_frame_says_all_there_is() -> None:
    text = "\n".join(draw(FULL, width=80))
    for said in (
        "runs/cola   linchain-3-16 on cola",
        "1,240 of 5,000",
        "24.8 %",
        "19.8 steps/s   left 3 min 10 s   took 1 min 3 s",
        "0.4123   mean of 50: 0.4321   lr 2.00e-04",
        "norm 0.5318   clipped 12.3 %   skipped 3 (0.2 %)",
        "5.12 ms a step (median)   2.31 % of the time",
        "eval accuracy 0.534 (step 1,200)",
        "no_gradient since step 120: no gradient reaches B",
        "frozen since step 10: no gradient is asked for of A",
        "gate_proj             9.81   8.20 – 11.30  ▁",
        "gate_proj            1.2e-03  1.2e-03  1.2e-03",
    ):
        assert said in text, text


def test_the_most_important_lines_are_shown_first() -> None:
    shown = ["\n".join(draw(FULL, height=height)) for height in (1, 2, 3, 5, 6, 12)]
    words = ["running", "1,240 of", "mean of", "no_gradient", "▁", "eff. rank"]
    for count, text in enumerate(shown, 1):
        assert [word in text for word in words[:count]] == [True] * count, text
    assert "more kinds" in shown[-1]
    assert "update ratio" not in shown[-1]


def test_the_layout_follows_the_number_of_runs() -> None:
    assert sum("eff. rank" in line for line in draw(*many(1))) == 1
    assert sum("eff. rank" in line for line in draw(*many(4))) == 4
    lines = draw(*many(5))
    assert lines[0] == "5 runs: 5 running"
    assert [line.split()[0] for line in lines[2:7]] == [f"grid/run-{number}" for number in (4, 3, 2, 1, 0)]
    mixed = [*many(5), replace(FULL, name="old", status="complete", is_over=True, started="2027")]
    assert draw(*mixed)[7].split()[:5] == ["old", "complete", "1,240", "of", "5,000"]
    assert draw(*many(30), height=10)[-1] == "… 23 more runs"


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_damaged_run_is_one_line_of_reasons(count: int) -> None:
    damaged = RunView("bad", "damaged", "steps.arrows: a wrong checksum\n in batch 3; restore it", is_over=True)
    lines = draw(damaged, *many(count))
    assert sum("a wrong checksum  in batch" in line for line in lines) == 1
    assert any("bad" in line and "damaged" in line for line in lines)


def test_what_a_run_does_not_have_is_left_out() -> None:
    bare = RunView("bare", "running", steps=StepsView(step=3, num_rows=3, losses=np.full(3, NAN), loss=2.0))
    labels = [line.split()[0] for line in draw(bare) if line.strip()]
    assert labels == ["bare", "step", "loss", "gradient"]
    nothing = KindRank("q_proj", NAN, NAN, NAN, np.full(3, NAN))
    text = "\n".join(draw(replace(bare, ranks=(nothing,), preset="light")))
    assert "preset light takes no spectra" in text
    assert "no step yet" in "\n".join(draw(RunView("new")))


def test_what_others_wrote_cannot_command_the_terminal() -> None:
    evil = replace(FULL, name="a\x1b[2Jb", message="x\ny", method="[red]m[/red]")
    for views in ([evil], [evil] * 3, [evil] * 9):
        text = "\n".join(draw(*views))
        assert "\x1b" not in text
        assert "a [2Jb" in text


@pytest.mark.parametrize("count", [1, 3])
def test_only_labels_are_dim(count: int) -> None:
    for line in draw_frame(many(count), 80, None, UNICODE).renderables:
        assert isinstance(line, Text)
        if line.plain.startswith(("step", "loss", "pace")):
            assert line.style == ""
            assert [(span.start, span.end) for span in line.spans if span.style == "dim"] == [(0, 13)]


def test_a_quiet_run_is_told() -> None:
    quiet = replace(FULL, quiet_seconds=90.0)
    assert "no step for 1 min 30 s" in "\n".join(draw(quiet))
    assert "quiet" in "\n".join(draw(*[quiet] * 6))
    # A step of a minute is no reason to worry.
    slow = replace(quiet, steps=replace(FULL.steps, steps_per_second=1 / 60))
    assert "no step" not in "\n".join(draw(slow))


def test_long_chains_show_both_ends() -> None:
    factors = ["A", *(f"W{i}" for i in range(1, 21)), "B"]
    view = replace(FULL, ratios={kind: dict.fromkeys(factors, 0.001) for kind in KINDS})
    heading = next(line for line in draw(view) if line.startswith("update ratio"))
    assert heading.split() == ["update", "ratio", "A", "W1", "W2", "W3", "B"]


def test_curves() -> None:
    assert draw_line(np.arange(8.0), 20, UNICODE) == "▁▂▃▄▅▆▇█"
    assert draw_line(np.array([1.0, NAN, 3.0]), 20, UNICODE) == "▁ █"
    assert draw_line(np.full(4, 2.0), 20, ASCII) == "++++"
    assert draw_line(np.full(4, NAN), 20, UNICODE) == ""
    assert draw_line(np.array([-1.7e308, 0.0, 1.7e308]), 3, UNICODE) == "▁▅█"
    assert draw_curve(np.arange(16.0), 20, 2, UNICODE) == ["        ▁▂▃▄▅▆▇█", "▁▂▃▄▅▆▇█████████"]
    np.testing.assert_allclose(average_buckets(np.arange(10.0), 5), [0.5, 2.5, 4.5, 6.5, 8.5])
    assert np.isnan(average_buckets(np.array([NAN, NAN, 1.0, math.inf]), 2)).tolist() == [True, False]
    assert draw_bar(0.5, 4, ASCII) == "##--"
    assert draw_bar(1.5, 4, ASCII) == "####"


def test_words() -> None:
    assert [tell_time(s, UNICODE) for s in (0.04, 9.94, 59.6, 61, 3661, 90000, NAN, math.inf)] == [
        "0.0 s",
        "9.9 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 1 min",
        "1 d 1 h",
        "–",
        "–",
    ]
    assert [tell_number(v) for v in (NAN, math.inf, 0.0, 12.34567, 1e-5, 1e9)] == [
        "nan",
        "inf",
        "0",
        "12.35",
        "1.00e-05",
        "1.00e+09",
    ]
    assert tell_speed(0.1, UNICODE) == "10 s a step"
