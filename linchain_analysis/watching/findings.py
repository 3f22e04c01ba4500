"""What the health report found and what of it holds still."""

from __future__ import annotations

from collections.abc import Sequence

from linchain_analysis.watching.view import Finding


class FindingsSoFar:
    """Collects rows of `health`: each says that a finding began or ended. None holds twice at a time."""

    def __init__(self) -> None:
        self._holding: dict[str, Finding] = {}

    def add(
        self,
        steps: Sequence[int],
        findings: Sequence[str],
        subjects: Sequence[str | None],
        began: Sequence[bool | None],
        messages: Sequence[str | None],
    ) -> None:
        """Add rows in their order."""
        for step, finding, subject, begins, message in zip(steps, findings, subjects, began, messages, strict=True):
            self._holding.pop(finding, None)
            if begins:
                self._holding[finding] = Finding(finding, subject or "", step, message or "")

    def forget(self) -> None:
        """Begin anew: a training that goes on from a checkpoint finds again what holds."""
        self._holding.clear()

    def view(self) -> tuple[Finding, ...]:
        """Return what holds now, the latest first."""
        return tuple(reversed(self._holding.values()))
