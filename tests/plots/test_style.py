import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from linchain_analysis.plots.panels import draw_legend
from linchain_analysis.plots.style import DASHES, assign_styles, paper_style

PAPER = ["lora-16", "moslora-16", "linchain-2-8", "linchain-3-16", "full-finetune"]
STUDY = [f"linchain-{n}-16-{init}" for n in range(5) for init in ("he", "lecun", "orthogonal", "identity")]


def test_the_methods_of_the_paper_never_change_whoever_stands_beside_them() -> None:
    alone = {method: assign_styles([method])[method] for method in PAPER}
    beside = assign_styles([*PAPER, *STUDY])
    assert {method: beside[method] for method in PAPER} == alone
    assert len({style.color for style in alone.values()}) == len({style.dash for style in alone.values()}) == 5


def test_every_method_has_a_look_of_its_own() -> None:
    assert len(set(assign_styles([*PAPER, *STUDY]).values())) == len(PAPER) + len(STUDY)


def test_more_methods_than_styles_still_have_one() -> None:
    assert len(assign_styles(f"own-{k}" for k in range(80))) == 80


def test_dashes_differ() -> None:
    assert len(set(DASHES)) == 8


def test_styles_are_the_same_in_every_process() -> None:
    code = "from linchain_analysis.plots.style import assign_styles; print(assign_styles(['own', 'lora-8']))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert "lora-8" in found.pop()


def test_drawing_needs_no_torch() -> None:
    code = "import sys, linchain_analysis.plots, linchain_analysis.analysis; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chains_of_one_length_share_a_colour_and_inits_differ_by_dash() -> None:
    styles = assign_styles(["lora-8", "moslora-8", "linchain-3-8", "linchain-3-8-orthogonal", "linchain-3-16"])
    paper = assign_styles(PAPER)
    assert styles["lora-8"] == paper["lora-16"]
    assert styles["moslora-8"] == paper["moslora-16"]
    three = [styles[f"linchain-3-{name}"] for name in ("8", "8-orthogonal", "16")]
    assert {style.color for style in three} == {paper["linchain-3-16"].color}
    assert len({style.dash for style in three}) == 3
    assert styles["linchain-3-16"] == paper["linchain-3-16"]  # and the other one of rank 8 gives way


@pytest.mark.parametrize("ending", ["", "-w16-orthogonal"])
def test_a_legend_is_no_wider_than_its_figure(ending: str) -> None:
    names = [f"linchain-{n}-16{ending}" for n in range(2, 10)]
    with paper_style():
        figure = Figure(figsize=(6.75, 2), layout="constrained")
        draw_legend(figure, assign_styles(names), 6.75)
        figure.canvas.draw()
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width


def test_an_init_has_a_marker_and_a_style_stays_one_by_colour_and_dash() -> None:
    inits = {"": "o", "-orthogonal": "s", "-identity": "D", "-he": "^", "-lecun": "v"}
    styles = assign_styles(f"linchain-3-8{init}" for init in inits)
    assert [styles[f"linchain-3-8{init}"].marker for init in inits] == list(inits.values())
    assert len({(style.color, style.dash) for style in styles.values()}) == len(inits)  # told apart without markers
    assert assign_styles(["lora-8"])["lora-8"].mark(2.0) == {"marker": "o", "markersize": 2.0}
