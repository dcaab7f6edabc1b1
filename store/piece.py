"""A piece of the log as sessions that fell behind are served from: read once, shared by all who wait at its place.

Which of its messages a session gets depends only on the session's filters, so sessions with the same filters share that answer
too; others are answered through the piece's topics, at the cost of what matches and not of what does not.

Invariant: for the filters it was read for, a piece holds every message with QoS > 0 from `first` through `through`, in order of
seq.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, chain
from operator import itemgetter

from .topic import TopicTree

Stored = tuple[int, bytes, int, bytes, bytes, int, int, int, int]
"""A message read back: (seq, raw topic, flags, payload, properties, client, at, mono, run). A plain tuple, for speed.

`mono` is read only with properties, where an expiry may be; else it is 0.
"""

MESSAGE = 300
"""Bytes of memory that a message costs besides its payload, about."""
MAX_FOUND = 50_000
"""Messages and filters that a piece's answers may list together."""

_seq = itemgetter(0)


class Piece:
    """A part of the log. It never gets out of date, because entries do not change."""

    __slots__ = ("_found", "_listed", "_places", "_topics", "filters", "first", "messages", "plain", "size", "through")

    def __init__(
        self, first: int, through: int, messages: list[Stored], filters: frozenset[str] | None = None, plain: int = -1
    ) -> None:
        self.first = first
        self.through = through
        self.messages = messages
        self.filters = filters
        """It is complete for these; None: for all."""
        self.plain = plain
        """Payload size if every message has QoS 1, is not retained and has no properties and this size; else -1."""
        self._topics: TopicTree[bytes] = TopicTree()
        topics = {message[1] for message in messages}
        for raw in topics:
            self._topics.put(raw.decode(), raw)
        self._places: dict[bytes, list[int]] = {}
        payloads = plain * len(messages) if plain >= 0 else sum(len(message[3]) + len(message[4]) for message in messages)
        self.size = payloads + MESSAGE * len(messages) + 3 * sum(map(len, topics))
        self._found: dict[tuple[str, ...], list[Stored]] = {}
        self._listed = 0

    def serves(self, seq: int, filters: Iterable[str]) -> bool:
        """Whether a session at `seq` with these filters finds here what comes next for it."""
        return self.first <= seq <= self.through and (self.filters is None or self.filters.issuperset(filters))

    def take(self, seq: int, filters: tuple[str, ...], limit: int) -> tuple[list[Stored], int]:
        """What matches from `seq` on, in about `limit` bytes of memory but at least one; and through where that is all."""
        found = self._select(filters)
        start = bisect_left(found, seq, key=_seq) if seq > self.first else 0
        left = len(found) - start
        if self.plain >= 0:
            count = max(1, limit // (self.plain + MESSAGE))
        elif left:
            sizes = accumulate(_size(found[at]) for at in range(start, len(found)))
            count = max(1, sum(1 for _ in _below(sizes, limit)))
        else:
            count = 1
        if count >= left:
            return found[start:], self.through
        taken = found[start : start + count]
        return taken, taken[-1][0]

    def _select(self, filters: tuple[str, ...]) -> list[Stored]:
        found = self._found.get(filters)
        if found is None:
            topics = {raw for text in filters for raw in self._topics.find(text)}
            if len(topics) == len(self._topics):
                found = self.messages
            else:
                if not self._places:
                    self._note_places()
                places = sorted(chain.from_iterable(self._places[raw] for raw in topics))
                found = [self.messages[place] for place in places]
                self._listed += len(found)
            self._listed += len(filters)
            if self._listed > MAX_FOUND:
                self._found.clear()
                self._listed = len(found) + len(filters)
            self._found[filters] = found
        return found

    def _note_places(self) -> None:
        for place, message in enumerate(self.messages):
            self._places.setdefault(message[1], []).append(place)


def _size(message: Stored) -> int:
    return len(message[1]) + len(message[3]) + len(message[4]) + MESSAGE


def _below(sizes: Iterable[int], limit: int) -> Iterable[int]:
    for size in sizes:
        if size > limit:
            return
        yield size
