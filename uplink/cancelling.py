"""Messages of queues and their acknowledgements that cancel each other while both are still here: neither is sent up.

A message that a client took out of its queue (`taken`, or acknowledged in the same stretch of the log) is not stored at the far
end any more, and its acknowledgement then has nothing to take out there. Where an attempt before may have left the message
(`Link.tried`), the acknowledgement is sent all the same: it takes out what may be there.

Invariant: an acknowledgement is left out only when its message was, and was never tried before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from tidegate.store.entry import ACKED, PUBLISH, Entry

from .backend import Mark
from .plan import Plan

MOST = 10_000
"""Messages that were left out and whose acknowledgements have not come yet; of older ones the acknowledgement is sent."""


class Log(Protocol):
    """What this needs of `store.reader.LogReader`."""

    def taken(self, first: int, last: int) -> set[int]: ...


class Cancelling:
    """`among(entries)`: the seqs of those that need not be sent."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self._plan = plan
        self._log = log
        self._left_out: dict[str, None] = {}

    def among(self, entries: Sequence[Entry], mark: Mark, tried: float) -> set[int]:
        if not self._plan.has_queues or mark.done:  # what is done of an entry is counted with all of its writes
            return set()
        entries = [entry for entry in entries if entry.seq > mark.seq and entry.kind in (PUBLISH, ACKED)]
        entries = [entry for entry in entries if self._plan.is_queue(entry.topic)]
        if not entries:
            return set()
        taken = self._log.taken(entries[0].seq, entries[-1].seq)
        acked = {entry.payload.decode(errors="replace") for entry in entries if entry.kind == ACKED}
        gone = [entry for entry in entries if entry.kind == PUBLISH and (entry.seq in taken or entry.msgid in acked)]
        self._left_out |= dict.fromkeys(entry.msgid for entry in gone if entry.seq > tried)
        while len(self._left_out) > MOST:
            del self._left_out[next(iter(self._left_out))]
        answered = [e for e in entries if e.kind == ACKED and e.payload.decode(errors="replace") in self._left_out]
        return {entry.seq for entry in (*gone, *answered)}

    def last_tried(self, entries: Sequence[Entry], cancelled: Collection[int]) -> int:
        """The last of these that is sent and that an acknowledgement may cancel; 0: none."""
        if not self._plan.has_queues:
            return 0
        sent = (e.seq for e in entries if e.kind == PUBLISH and e.seq not in cancelled and self._plan.is_queue(e.topic))
        return max(sent, default=0)
