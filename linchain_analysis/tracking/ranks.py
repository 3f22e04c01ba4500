"""What the processes that train one model together tell each other: once per optimiser step, and before the first.

The training's own process groups, their names and the order of what goes over them are left as they are: the trackers
meet through the store that the processes found each other by, and then have connections of their own.
"""

from __future__ import annotations

import atexit
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

MEETING_TIMEOUT_S = 10.0  # how long the first to end its first step waits for the trackers of the others
EXCHANGE_TIMEOUT_S = 60.0  # how long a step waits for a process that left, before tracking ends
_POLL_S = 0.005
_OK = 0  # the column that tells whether tracking goes on

_NUM_MEETINGS: Counter[str] = Counter()  # how many trackers of a kind this process has had


_OPEN: WeakSet[Ranks] = WeakSet()


@atexit.register
def _close_open_ranks() -> None:
    """Join the threads of connections while there is an interpreter: torch ends the process where they outlive it."""
    for ranks in list(_OPEN):
        ranks.close()


class PeerError(Exception):
    """Tracking ends here because of what another process did or did not."""


class Ranks:
    """The processes of one training, as one of their trackers sees them.

    Nothing waits before the first exchange, at which all are expected to have a tracker: a step has just ended, so they
    are as close to each other as they ever are. If one does not come, as in a script that makes a tracker on rank 0
    only, each goes on alone, and all are of one mind about that.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        alone: Whether the others did not come.
        left: Whether this process has told the others that it tracks no more, or cannot reach them.
    """

    def __init__(self, store: Any, rank: int, size: int, topic: str) -> None:
        digest = hashlib.sha256(topic.encode()).hexdigest()[:16]
        _NUM_MEETINGS[digest] += 1
        self.rank, self.size = rank, size
        self.alone = self.left = size == 1
        self._key = f"linchain_analysis/{digest}/{_NUM_MEETINGS[digest]}"
        self._store = store
        self._group: Any = None
        _OPEN.add(self)

    @property
    def leads(self) -> bool:
        """Whether this process writes the run."""
        return self.rank == 0

    def exchange(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Tell the others `values` and return those of all, (size, len(values)); of this one alone where others lack.

        Raises:
            PeerError: Another process had a fault, is gone, or kept this one waiting for too long.
        """
        if self.size == 1 or not self._meet():
            return np.array([values], dtype=np.float64)
        told = self._all_gather([1.0, *values])
        failed = np.flatnonzero(told[:, _OK] == 0)
        if len(failed):
            self._part()
            raise PeerError(f"tracking had ended on rank {failed[0]}")
        return told[:, 1:]

    def leave(self, num_values: int) -> None:
        """Tell the others, in the exchange of `num_values` that is due, that this process tracks no more."""
        if self.left:
            return
        try:
            if self._meet():
                self._all_gather([0.0] * (1 + num_values))
        except PeerError:
            pass
        finally:
            self._part()

    def refuse(self) -> None:
        """Let those that come to the meeting later go on without this process, which could not even begin."""
        if self._group is None and not self.left:
            try:
                self._decide("alone")
            except Exception:  # the store went with the process that held it
                self.left = True

    def close(self) -> None:
        """Be gone: whoever still waits for this process learns it at once. Waits for nobody."""
        self._part()

    def _part(self) -> None:
        self.left, self._group = True, None

    def _meet(self) -> bool:
        """Whether all are connected; the first call waits for that."""
        if self.left:
            raise PeerError("the connection to the other processes is closed")
        if self._group is not None or self.alone:
            return not self.alone
        try:
            if self._store.add(f"{self._key}/count", 1) == self.size:
                self._decide("together")
            end = time.monotonic() + MEETING_TIMEOUT_S
            while not self._store.check([f"{self._key}/verdict"]):
                if time.monotonic() > end:
                    self._decide("alone")
                time.sleep(_POLL_S)
            if self._store.get(f"{self._key}/verdict") != b"together":
                self.alone = True
                return False
            self._group = distributed.ProcessGroupGloo(
                torch._C._distributed_c10d.PrefixStore(f"{self._key}/gloo", self._store),
                self.rank,
                self.size,
                timedelta(seconds=EXCHANGE_TIMEOUT_S),
            )
        except RuntimeError as error:  # of torch's distributed package, all are
            self._part()
            raise PeerError(f"the other processes could not be reached: {_first_line(error)}") from error
        return True

    def _decide(self, verdict: str) -> None:
        """Settle what the first to decide says: all will read the same."""
        self._store.compare_set(f"{self._key}/verdict", "", verdict)

    def _all_gather(self, row: Sequence[float]) -> NDArray[np.float64]:
        own = torch.tensor(row, dtype=torch.float64)
        rows = torch.empty(self.size, len(row), dtype=torch.float64)
        try:
            self._group.allgather([list(rows.unbind())], [own]).wait()
        except RuntimeError as error:
            self._part()
            raise PeerError(f"another process has left or does not answer: {_first_line(error)}") from error
        return rows.numpy()


def find_ranks(topic: str, *, in_parts: bool) -> Ranks | None:
    """Return the processes that this one trains together with; None where it is by itself.

    Args:
        topic: What is tracked, the same in every process: trackers of one topic meet.
        in_parts: Whether parameters are held in parts, if only by one process.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.is_gloo_available()):
        return None
    size = distributed.get_world_size()
    if size == 1 and not in_parts:
        return None
    store = distributed.distributed_c10d._get_default_store()  # type: ignore[no-untyped-call, unused-ignore]
    return Ranks(store, distributed.get_rank(), size, topic)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
