"""Answer, while a training goes on, whether its adapter learns at all, and if not why."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from linchain_analysis.measures.spectral import effective_rank
from linchain_analysis.probes import Chain, Reading
from linchain_analysis.tracking.adapter_states import find_frozen_adapters
from linchain_analysis.tracking.announcements import Announcements, Finding
from linchain_analysis.tracking.evidence import Evidence
from linchain_analysis.tracking.findings import INFORMATION, NAMES, judge
from linchain_analysis.tracking.numbers import find_broken_numbers
from linchain_analysis.tracking.observers import FinishedStep
from linchain_analysis.tracking.subjects import Mask, Subjects

_REPORT_AFTER = 10  # steps
_LOOK_EVERY = 10  # recorded steps
_RANKS_EVERY = 50  # recorded steps
_MOST_SKIPPED = 10
_FINITE_AGAIN = 10  # steps that happened
_DEAD_ENTER, _DEAD_LEAVE = 1.1, 1.2


class Health:
    """Reports on the first steps, and whenever something begins or ends later.

    Args:
        chains: The modules that are recorded.
        model: Holds them; kept weakly.
        optimizer: Trains them; kept weakly.
        write: Takes the columns of the table `health`.
        say: Takes a line for the user.
    """

    name = "the health report"

    def __init__(
        self,
        chains: Sequence[Chain],
        model: nn.Module,
        optimizer: Optimizer,
        write: Callable[[Mapping[str, Sequence[Any]]], Any],
        say: Callable[[str], None],
    ) -> None:
        self._chains = list(chains)
        self._model = weakref.ref(model)
        self._subjects = Subjects(chains)
        self._evidence = Evidence(chains, optimizer)
        self._announcements = Announcements(write, say)
        self._say = say
        self._reported = False
        self._step = 0
        self._finite, self._skipping = 0, False
        self._next_look = self._next_ranks = 0
        self._refused = np.array([chain.refused is not None for chain in chains], dtype=bool)
        # Of an adapter of width 1 one direction is all there can be.
        widths = [min((min(factor.shape) for factor in chain.factors), default=1) for chain in chains]
        self._wide = (np.array(widths, dtype=int) > 1) & ~self._refused
        self._dead = np.zeros(len(self._chains), dtype=bool)

    def see(self, finished: FinishedStep) -> None:
        """Take one step, and say what is to be said of it."""
        self._step = finished.step
        seen = self._evidence
        seen.add(finished)
        self._watch_numbers(finished)
        self._watch_skipping()
        if finished.reading is None:
            return
        if not self._reported:
            if seen.num_steps >= _REPORT_AFTER:
                self._report(finished.reading)
        elif seen.num_recorded >= self._next_look:
            self._look(finished.reading)

    def close(self) -> None:
        """Report on a run that was too short for it."""
        if not self._reported:
            self._report(None)
        self._chains = []

    # --- looks -------------------------------------------------------------------------------------------------

    def _report(self, reading: Reading | None) -> None:
        """The first look, which also says that all is well."""
        self._reported = True
        if self._refused.any():
            subject = self._subjects.modules(self._refused)
            finding = Finding("refused", subject, "delta is not measured.", int(self._refused.sum()), said=False)
            self._announcements.update(self._step, [finding], ["refused"])
        self._look(reading)

    def _look(self, reading: Reading | None) -> None:
        seen, model = self._evidence, self._model()
        first = self._next_look == 0
        # Where few steps are recorded, the next ones are soon looked at.
        self._next_look = seen.num_recorded + min(max(seen.num_recorded, 1), _LOOK_EVERY)
        if not self._chains:
            # The tracker has said at the beginning that it records no module, and why.
            frozen = [] if model is None else [replace(f, said=False) for f in find_frozen_adapters(model)]
            self._announcements.update(self._step, frozen, NAMES)
            return
        found, meant = judge(self._chains, self._subjects, seen, model)
        looked_for = [*NAMES]
        if reading is not None and seen.num_recorded >= self._next_ranks:
            self._next_ranks = seen.num_recorded + _RANKS_EVERY
            found += self._dead_directions(reading)
            looked_for.append("dead_directions")
        names = {finding.name for finding in (*found, *self._announcements.holding)}
        if first and seen.num_recorded and names <= set(INFORMATION):
            self._say(f"health after step {self._step}: {self._describe_well(meant)}")
        self._announcements.update(self._step, found, looked_for)

    def _describe_well(self, meant: Mask) -> str:
        """What is well, as far as the steps show it."""
        seen, subjects = self._evidence, self._subjects
        if not meant.any() or not (seen.had_gradient & seen.moved & seen.was_nonzero)[meant].all():
            return f"nothing wrong found, with {seen.num_recorded} of {seen.num_steps} steps recorded."
        modules = np.zeros(len(self._chains), dtype=bool)
        modules[subjects.module_of[meant]] = True
        which = subjects.modules(modules)
        began = {name for name, zero in zip(subjects.factor_names, seen.began_at_zero & meant, strict=True) if zero}
        zero = f"{began.pop()} has left zero everywhere" if len(began) == 1 else "no factor is zero"
        unmeasured = f" ΔW of {subjects.modules(self._refused)} is not measured." if self._refused.any() else ""
        reach = "every factor" if meant.all() else "every factor that trains"
        verb = "learns" if modules.sum() == 1 else "learn"
        return f"{which} {verb}; gradients reach {reach}, {zero}.{unmeasured}"

    def _dead_directions(self, reading: Reading) -> list[Finding]:
        """Modules whose delta has one direction although there is room for more."""
        spectra = reading.delta_spectrum
        longest = max((len(sigma) for sigma in spectra if sigma is not None), default=0)
        if not longest:
            return []
        padded = np.zeros((len(spectra), longest))
        for row, sigma in zip(padded, spectra, strict=True):
            if sigma is not None:
                row[: len(sigma)] = sigma
        rank = effective_rank(padded)
        with np.errstate(invalid="ignore"):
            self._dead = self._wide & ((rank <= _DEAD_ENTER) | (self._dead & (rank < _DEAD_LEAVE)))
        if not self._dead.any():
            return []
        subject = self._subjects.modules(self._dead)
        message = (
            f"one direction is nearly all of ΔW (effective rank {_DEAD_ENTER} or less), as if r were 1, in {subject}; "
            "that may be all the task needs; where not, look at the learning rate and at alpha."
        )
        return [Finding("dead_directions", subject, message, int(self._dead.sum()))]

    # --- every step --------------------------------------------------------------------------------------------

    def _watch_numbers(self, finished: FinishedStep) -> None:
        if finished.values.get("skipped"):
            return  # the gradient scaler has dealt with it
        broken = find_broken_numbers(finished, self._chains, self._subjects, self._evidence, self._refused)
        if broken is not None:
            self._finite = 0
            self._announcements.update(finished.step, [broken], ["non_finite"])
        elif finished.reading is not None:
            self._finite += 1
            if self._finite == _FINITE_AGAIN:
                self._announcements.update(finished.step, [], ["non_finite"], looks_without=1)

    def _watch_skipping(self) -> None:
        num_skipped = self._evidence.num_skipped
        if not self._skipping and num_skipped >= _MOST_SKIPPED:
            message = (
                f"the gradient scaler left out the last {num_skipped} steps, since gradients were NaN or Inf at every "
                "scale; train in bfloat16 or float32, or lower the learning rate."
            )
            finding = Finding("skipping", "steps", message)
            self._skipping = True
            self._announcements.update(self._step, [finding], ["skipping"])
        elif self._skipping and not num_skipped:
            self._skipping = False
            self._announcements.update(self._step, [], ["skipping"], looks_without=1)
