"""Write docs/controls.md from figures/controls/findings.json.

`python -m linchain_analysis.calibrate --out figures/controls` found it.

`python docs/make_controls.py` writes it; with `--check` it is only compared, and exit code 1 says that it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linchain_analysis.controls.findings import read_findings

PAGE = Path(__file__).with_name("controls.md")
FIGURES = PAGE.parent.parent / "figures" / "controls"
COMMAND = "python docs/make_controls.py"

INTRODUCTION = """<!-- Written by `{command}` from figures/controls/findings.json. -->

# Positive controls

A null result means something only if the instrument sees effects that are known to exist. Each control reproduces one
of them with the measures of this package, by a criterion that stands in its code and is the same at every run. Few
criteria were written before anything had been seen: the history of each control says what had been tried before, and
what of criterion or settings was changed after results had been seen. Sizes, ranges of rates and lengths of training
were chosen by trying, so that a pass says that the instrument can see the effect, not how general the effect is.

```
python -m linchain_analysis.calibrate                          # all of them, into runs/controls, which git ignores
python -m linchain_analysis.calibrate rslora lora-plus         # some; --list prints all with their criteria
python -m linchain_analysis.calibrate --out figures/controls   # renews what this page is made of; then:
{command}
```

{passed} of {total} pass. Together they took {minutes:.1f} minutes on the machine of the figures; the longest,
{longest}, took {seconds:.0f} seconds.
"""


def write_page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as Markdown.

    Args:
        found: What `read_findings` returned.
    """
    passed = sum(bool(one["passed"]) for one in found.values())
    times = {name: float(one["seconds"]) for name, one in found.items()}
    longest = max(times, key=times.__getitem__)
    introduction = INTRODUCTION.format(
        command=COMMAND,
        passed=passed,
        total=len(found),
        minutes=sum(times.values()) / 60,
        longest=longest,
        seconds=times[longest],
    )
    parts = [introduction, "\n".join(_overview(found)) + "\n"]
    parts += ["\n".join(_section(name, one)) for name, one in found.items()]
    return "\n".join(parts)


def _overview(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| control | known effect | result | seconds |"
    yield "| --- | --- | --- | --- |"
    for name, one in found.items():
        yield f"| [{name}](#{name}) | {_escape(one['claim'])} | {_verdict(one)} | {one['seconds']:.0f} |"


def _section(name: str, one: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{one['title']}: **{_verdict(one)}**.\n"
    for label in ("claim", "source", "criterion"):
        yield f"- **{label}**: {_escape(one[label])}"
    yield f"- **found**: {_escape(one['statement'])}"
    yield f"- **history**: {_escape(one['history'])}\n"
    yield f"![{one['title']}](../figures/controls/{name}/figure.png)\n"
    yield f"*Figure.* {_escape(one['caption'])}\n"
    yield "| measured | value |"
    yield "| --- | --- |"
    for label, value in one["measured"].items():
        yield f"| {_escape(label)} | {'undefined' if value is None else f'{value:.4g}'} |"
    yield ""


def _verdict(one: Mapping[str, Any]) -> str:
    return "passed" if one["passed"] else "failed"


def _escape(text: str) -> str:
    for mark in "|*_":
        text = text.replace(mark, "\\" + mark)
    return text


def main() -> None:
    """Write or check the page."""
    page = write_page(read_findings(FIGURES))
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE.name}: expected what findings.json says, got something else; run `{COMMAND}`.")
        return
    PAGE.write_text(page, encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
