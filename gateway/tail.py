"""The last messages that were committed, in memory: from them sessions a little behind are served, without the disk.

Only messages are kept, with the stretch of the log that they are all of: of a thousand clients that connect one after the other
nothing stays here but two numbers.

Invariant: of the log from `first` on, every message with QoS > 0 is here, in order of seq.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from tidegate.store.catchup import ROWS
from tidegate.store.entry import ADDRESSED, PUBLISH, QOS_MASK
from tidegate.store.log import Batch, Row
from tidegate.store.piece import Piece, Stored

BYTES = 24 << 20
"""Memory of all messages, about; given back when nothing more comes."""
REST = 30
"""Ticks (seconds) without a new batch until then."""
NOTHING = 1 << 62

_seq = itemgetter(0)


class Stretch(NamedTuple):
    """Of the log from `first` through `through` the messages; `size` in memory."""

    first: int
    through: int
    rows: Sequence[Row]
    size: int

    def since(self, seq: int) -> Sequence[Row]:
        return self.rows if seq <= self.first else self.rows[bisect_left(self.rows, seq, key=_seq) :]


class Tail:
    """See the module. `first` is the seq from which on it knows all; very high when it knows nothing."""

    def __init__(self) -> None:
        self.first = NOTHING
        self._stretches: deque[Stretch] = deque()
        self._bytes = 0
        self._rested = 0
        self._recent: Piece | None = None
        """The last piece that was made of it: all who are at its place share it."""

    def add(self, batch: Batch, only_messages: bool) -> None:
        """What was committed next; it has rows."""
        rows: Sequence[Row] = batch.rows if only_messages else tuple([row for row in batch.rows if _is_message(row)])
        through = batch.first_seq + len(batch.rows) - 1
        self._rested = 0
        if not rows and self._stretches:
            self._stretches[-1] = self._stretches[-1]._replace(through=through)
            return
        size = batch.size if rows else 0
        self._stretches.append(Stretch(batch.first_seq, through, rows, size))
        self._bytes += size
        while self._bytes > BYTES and len(self._stretches) > 1:
            self._bytes -= self._stretches.popleft().size
        self.first = self._stretches[0].first

    def tick(self) -> None:
        """Once a second: give the memory back when nothing has been committed for a while."""
        self._rested += 1
        if self._rested > REST:
            self.forget()

    def forget(self) -> None:
        """What was published is read from the log from now on."""
        self.first = NOTHING
        self._stretches.clear()
        self._bytes = 0
        self._recent = None

    def give_up(self, last: int) -> None:
        """Keep nothing of what was logged through `last`."""
        while self._stretches and self._stretches[0].first <= last:
            self._bytes -= self._stretches.popleft().size
        self.first = self._stretches[0].first if self._stretches else NOTHING
        self._recent = None

    def piece(self, first: int) -> Piece:
        """What a session that has come to `first`, where the tail has begun, gets next."""
        if self._recent is None or not self._recent.first <= first <= self._recent.through:
            self._recent = self._make(first)
        return self._recent

    def _make(self, first: int) -> Piece:
        """Like one that was read."""
        messages: list[Stored] = []
        through = first
        for stretch in self._stretches:
            if stretch.through < first:
                continue
            through = stretch.through
            for row in stretch.since(first):
                messages.append((row[0], row[6].raw, row[7], row[8], row[9] or b"", row[5], row[1], row[2], row[3]))
            if len(messages) >= ROWS:
                break
        kinds = {(message[2], len(message[3]), message[4]) for message in messages}
        flags, size, properties = kinds.pop() if len(kinds) == 1 else (0, 0, b"")
        return Piece(first, through, messages, None, size if flags == 1 and not properties else -1)

    def row(self, seq: int) -> Row | None:
        """The row of a message that is still here."""
        if seq >= self.first:
            for stretch in self._stretches:
                if seq <= stretch.through:
                    found = stretch.since(seq)
                    return found[0] if found and found[0][0] == seq else None
        return None


def _is_message(row: Row) -> bool:
    return (row[4] == PUBLISH or row[4] == ADDRESSED) and bool(row[7] & QOS_MASK)
