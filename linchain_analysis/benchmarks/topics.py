"""What can be measured, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linchain_analysis.errors import InputError

if TYPE_CHECKING:
    from linchain_analysis.benchmarks.rows import Row
    from linchain_analysis.benchmarks.settings import Settings


@dataclass(frozen=True)
class Topic:
    """A group of results that are measured together.

    Attributes:
        name: Name; the topic's module has the same one.
        about: What it measures, in one line.
        on_request: Whether it is left out unless it is asked for.
    """

    name: str
    about: str
    on_request: bool = False

    def measure(self, settings: Settings) -> Iterator[Row]:
        """Measure, and yield each row as soon as it is known."""
        # Here and not above: topics are listed and refused without torch.
        module = importlib.import_module(f"linchain_analysis.benchmarks.{self.name}")
        measure: Callable[[Settings], Iterator[Row]] = getattr(module, f"measure_{self.name}")
        return measure(settings)


TOPICS = (
    Topic("tracker", "a tracked training step over an untracked one, by preset; the tracker's ms a step"),
    Topic("growth", "the tracker's ms a step over the number of modules, their width and their rank"),
    Topic("memory", "tensors the tracker keeps, and how far it goes above them during a step"),
    Topic("floor", "the tracker's time over that of merely reading factors and gradients"),
    Topic("linchain", "training LinChain over training LoRA: steps, one layer, memory saved for backward"),
    Topic("log", "bytes of the log for each module and step, and of a long run under every=auto"),
    Topic("reading", "seconds to read and to draw a long run"),
    Topic("peers", "what wandb, TensorBoard and naive spectra cost beside the tracker", on_request=True),
)


def choose_topics(only: str | None = None, *, peers: bool = False) -> Sequence[Topic]:
    """Return the topics to measure, in their order.

    Args:
        only: Names separated by commas; all but those on request if unset.
        peers: Whether the peers are asked for.

    Raises:
        InputError: A name that is not known.
    """
    known = {topic.name: topic for topic in TOPICS}
    if only is None:
        return [topic for topic in TOPICS if peers or not topic.on_request]
    names = [part.strip() for part in only.split(",")]
    for name in names:
        if name not in known:
            raise InputError(
                "--only", expected=f"topics among {', '.join(known)}", got=repr(name), do="correct the name"
            )
    wanted = {*names, *(["peers"] if peers else [])}
    return [topic for topic in TOPICS if topic.name in wanted]
