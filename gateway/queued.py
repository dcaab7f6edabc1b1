"""What waits for clients that do not read, all together: shares that become smaller with their number, and a last resort.

Each waiting client has a share of half the limit. What is above is dropped (QoS 0) or left in the log (QoS 1 and 2). A client's
first turn comes before anybody knows that it does not read, so very many can still go beyond: at the limit whoever holds
the most is disconnected. What was promised to it is in the log.

Invariant: after `Link.write` no more bytes than `limit` and one turn of one client wait.
"""

from __future__ import annotations

from typing import Protocol


class Holder(Protocol):
    """A connection for which bytes wait."""

    def buffered(self) -> int: ...


class Queued:
    """Kept up to date by the links; `bytes` wait."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.share = limit
        """Bytes that may wait for one client."""
        self._limit = limit
        self._holders: dict[Holder, None] = {}

    def begin(self, holder: Holder) -> None:
        """Its socket does not take any more."""
        self._holders[holder] = None
        self._divide()

    def end(self, holder: Holder) -> None:
        """It takes again, or is gone."""
        self._holders.pop(holder, None)
        self._divide()

    def largest(self) -> Holder | None:
        """Who must go because too much waits; nobody, usually."""
        return max(self._holders, key=lambda holder: holder.buffered()) if self.bytes > self._limit else None

    def _divide(self) -> None:
        self.share = self._limit // 2 // max(1, len(self._holders))
