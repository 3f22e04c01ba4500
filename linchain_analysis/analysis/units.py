"""In what unit runs state their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linchain_analysis.vocabulary import NATS

if TYPE_CHECKING:
    from linchain_analysis.runs import RunSet


def find_loss_unit(runs: RunSet) -> str:
    """Return the unit of the loss: `loss_unit` in the `extra` of the manifests, nats where one does not say.

    Several units are told with an `or`; their runs can be drawn together, though not compared.
    """
    found = {str(run.manifest.extra.get("loss_unit", NATS)) for run in runs.runs}
    return " or ".join(sorted(found)) or NATS
