"""Packets that are not complete yet, of all connections together: each may be as large as a packet may be. And topic aliases.

Whoever sends the rest of its packet gives the memory back, so what stays is what waits: above the limit somebody must go who
holds at least half of an equal share, and of those the one that has waited for the longest time. A device that is sending its
large packet right now is the last of them.

Invariant: `bytes` is what the connections hold, and no connection is named that holds nothing.
"""

from __future__ import annotations

Holder = object
"""A connection."""


class Unfinished:
    """Kept up to date by the connections, and only where a packet is left incomplete, grows or is completed."""

    def __init__(self, limit: int = 1 << 62) -> None:
        self.bytes = 0
        self._limit = limit
        self._sizes: dict[Holder, int] = {}
        """Who has sent something last stands last."""

    def hold(self, holder: Holder, size: int) -> None:
        """So many bytes of an incomplete packet and of aliases are there now."""
        self.bytes += size - self._sizes.pop(holder, 0)
        if size:
            self._sizes[holder] = size

    def worst(self) -> Holder | None:
        """Who must go because there is too much; nobody, usually."""
        if self.bytes <= self._limit:
            return None
        share = self.bytes // len(self._sizes) // 2
        return next(holder for holder, size in self._sizes.items() if size >= share)
