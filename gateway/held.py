"""What no trim may take: retained messages, and sessions with their subscriptions and client ids. Each has a share of the disk.

The trim lets go of messages; what is counted here stays until a client takes it back. So a share that is used up takes nothing
new, and says so, instead of breaking the disk budget. Counted is what the rows take at most, in their tables and indexes: small
rows share pages that are two thirds full, a large one has pages of its own.

Invariant: what is counted is what the store will hold after the current batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tidegate.store.topic import TopicTree
from tidegate.store.trim import WAL_SHARE

RETAINED_PART, SESSIONS_PART, EXCHANGES_PART = 4, 8, 16
"""Of the disk budget (less the write-ahead log's share) a quarter may be retained messages, an eighth sessions, a sixteenth
exchanges and positions (`rows`)."""
PAGE = 4096
ROW = 64
LARGE = 400
"""Bytes above which a row has pages of its own."""
SIZE_BITS = 29
"""A packet is never larger than 256 MiB (2.1.4)."""


class Shares(NamedTuple):
    """Bytes of the disk."""

    retained: int
    sessions: int
    exchanges: int


def shares(disk_budget: int, retained: int = 0, sessions: int = 0, exchanges: int = 0) -> Shares:
    """As told, or what the disk budget leaves; 0 = not told."""
    budget = max(disk_budget - WAL_SHARE, disk_budget // 2)
    return Shares(
        retained or budget // RETAINED_PART, sessions or budget // SESSIONS_PART, exchanges or budget // EXCHANGES_PART
    )


def overdrawn(disk_budget: int, held: Shares) -> str:
    """What to tell the user if so much that no trim may take could break the disk budget; "" if it could not."""
    if sum(held) <= disk_budget // 2:
        return ""
    given = " + ".join(f"{part >> 20} MiB" for part in held)
    return (
        f"limits.max_retained_bytes + max_session_bytes + max_exchange_bytes ({given}) are more than half of store.disk_budget"
        f" ({disk_budget >> 20} MiB), which they may break: lower them, or raise the budget"
    )


def row_bytes(length: int) -> int:
    """What a row with so many bytes of content takes at most."""
    return (length + ROW) * 3 // 2 if length <= LARGE else (length // PAGE + 2) * PAGE


def name_bytes(text: str) -> int:
    """A client id or topic: it stands in its table and in the index of names."""
    return 2 * row_bytes(len(text.encode()))


class Retained:
    """Topic -> seq of its retained message; `refused` counts those that the share had no room for."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.refused = 0
        self._limit = limit
        self._tree: TopicTree[int] = TopicTree()
        """seq and size in one number: there may be a hundred thousand."""

    def __len__(self) -> int:
        return len(self._tree)

    def takes(self, topic: str, size: int) -> bool:
        """Whether there is room for a message of so many bytes in the place of the topic's present one."""
        return self.bytes - self._taken_by(topic) + _bytes(topic, size) <= self._limit

    def put(self, topic: str, seq: int, size: int) -> None:
        self.bytes += _bytes(topic, size) - self._taken_by(topic)
        self._tree.put(topic, seq << SIZE_BITS | size)

    def remove(self, topic: str) -> bool:
        """Take the topic's message away; whether there was one."""
        self.bytes -= self._taken_by(topic)
        return self._tree.remove(topic)

    def find(self, topic_filter: str) -> Iterator[int]:
        """The seq of every retained message whose topic the filter matches."""
        return (value >> SIZE_BITS for value in self._tree.find(topic_filter))

    def _taken_by(self, topic: str) -> int:
        value = next(self._tree.find(topic), None)
        return 0 if value is None else _bytes(topic, value & (1 << SIZE_BITS) - 1)


def _bytes(topic: str, size: int) -> int:
    return name_bytes(topic) + row_bytes(size) + row_bytes(0)
