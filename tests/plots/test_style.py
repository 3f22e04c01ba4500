import subprocess
import sys

from linchain_analysis.plots.style import DASHES, assign_styles

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
