"""Which findings hold, when each began and ended, and how often that is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_SAID = 3  # of one finding's beginnings
_LOOKS_WITHOUT = 2
_GROWTH = 2  # one that holds for so many times as many is said anew


@dataclass(frozen=True)
class Finding:
    """Something about the health of a training that holds now.

    Attributes:
        name: Stable identifier.
        subject: What it is about, grouped.
        message: In words, with what to do.
        size: How many factors, modules or steps it is about.
        said: Whether it is said, or only written.
    """

    name: str
    subject: str
    message: str
    size: int = 1
    said: bool = True


class Announcements:
    """Writes a row for each finding that begins or ends, and says it, but no finding more than a few times.

    Args:
        write: Takes the columns of the table `health`.
        say: Takes a line.
    """

    def __init__(self, write: Callable[[Mapping[str, Sequence[Any]]], Any], say: Callable[[str], None]) -> None:
        self._write = write
        self._say = say
        self._open: dict[str, Finding] = {}
        self._said: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()

    @property
    def holding(self) -> list[Finding]:
        """What holds now."""
        return list(self._open.values())

    def update(
        self, step: int, found: Sequence[Finding], looked_for: Sequence[str], *, looks_without: int = _LOOKS_WITHOUT
    ) -> None:
        """Take what one look found.

        Args:
            step: The step after which it looked.
            found: What holds, at most one finding of a name.
            looked_for: Names of all findings that this look could have made.
            looks_without: A finding has ended when so many looks in a row did not find it.
        """
        now = {finding.name: finding for finding in found}
        for name in looked_for:
            old, new = self._open.get(name), now.get(name)
            self._missed[name] = 0 if new else self._missed[name] + 1
            if new and not old:
                self._begin(step, new)
            elif new and old and new.size >= _GROWTH * old.size:
                self._row(step, old, began=False)
                self._begin(step, new)
            elif old and self._missed[name] >= looks_without:
                self._end(step, old)

    def _begin(self, step: int, finding: Finding) -> None:
        self._open[finding.name] = finding
        self._row(step, finding, began=True)
        if not finding.said:
            return
        self._said[finding.name] += 1
        if self._said[finding.name] <= _MOST_SAID:
            last = " (Said for the last time.)" if self._said[finding.name] == _MOST_SAID else ""
            self._say(f"health after step {step}: {finding.name}: {finding.message}{last}")

    def _end(self, step: int, finding: Finding) -> None:
        del self._open[finding.name]
        self._row(step, finding, began=False)
        if finding.said and self._said[finding.name] <= _MOST_SAID:
            self._say(f"health after step {step}: {finding.name} has ended ({finding.subject}).")

    def _row(self, step: int, finding: Finding, *, began: bool) -> None:
        self._write(
            {
                "step": [step],
                "finding": [finding.name],
                "subject": [finding.subject],
                "began": [began],
                "message": [finding.message if began else "has ended"],
            }
        )
