"""The log as its one writer sees it: numbering entries and gathering what the next commit holds.

A batch is everything that happened since the last one was taken: entry rows, changes of the small state tables, and what
must be said once it is durable. It is committed whole or not at all, so a state change is never on disk without the row
that caused it. Names (client ids, topics) are interned to integers by the committer; a row or a change may hold a `Name`
whose number is not known yet, and the number is set only after its commit.

Time is CLOCK_BOOTTIME plus the offset of the clock (`store.clock`).

Invariant: seq rises by one with every entry and `at` never goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clock import Clock
    from .names import Unused

Row = tuple[Any, ...]
"""(seq, at, mono, run, kind, client, topic, flags, payload, properties); client and topic are a Name or None."""

Ack = int | bytes
"""An acknowledgement packet: those of 4 bytes as an integer, which is made and joined faster."""
ROW_BYTES = 250
"""What an entry costs in memory besides its payload, about."""
ACK_BYTES, CALL_BYTES = 50, 150
"""What an acknowledgement and a call that wait for a commit cost in memory, about."""
NAME_BYTES = 1_000
"""What a name that is new to the store costs in memory as long as an entry leads to it."""


class Name:
    """A client id or topic with its number in the store; 0 until the first commit that needs it."""

    __slots__ = ("id", "text")
    table = "client"

    def __init__(self, text: str, number: int = 0) -> None:
        self.text = text
        self.id = number


class Batch:
    """What one commit holds. `acks` and `after` belong to the broker: the store carries them through untouched."""

    __slots__ = ("acks", "after", "changes", "first_seq", "rows", "size", "together", "unused")

    def __init__(self, first_seq: int) -> None:
        self.first_seq = first_seq
        self.rows: list[Row] = []
        self.changes: list[tuple[str, tuple[Any, ...]]] = []
        self.together: list[range] = []
        """Places in `changes` of those that are all made or none."""
        self.acks: dict[Any, list[Ack]] = {}
        """Client -> acknowledgement packets that this commit allows."""
        self.after: list[tuple[Any, ...]] = []
        """(function, arguments …) to call once durable, in order."""
        self.size = 0
        """Bytes of memory, about."""
        self.unused: list[Unused] = []
        """Names to be removed at the end of the commit (see `store.names`)."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.changes or self.acks or self.after or self.unused)


class Log:
    """Numbers entries and gathers them into `batch`; `take` hands it over and begins the next.

    `at` (ms) goes into ids and never goes back; `now` is the time of day as far as it is known, which may.
    """

    def __init__(self, next_seq: int, at: int, run: int, clock: Clock) -> None:
        self.next_seq = next_seq
        self.run = run
        self.at = self.now = at
        self.mono = 0
        self.clock = clock
        self.batch = Batch(next_seq)

    def tick(self, mono: int) -> None:
        """CLOCK_BOOTTIME (ms) of what is appended next."""
        self.mono = mono
        self.now = now = mono + self.clock.offset
        if now > self.at:
            self.at = now

    def step(self, offset: int, level: int) -> None:
        """The clock is known better: what was written with the old offset is put right with the next commit."""
        for sql, parameters in self.clock.take(offset, level):
            self.change(sql, *parameters)
        self.tick(self.mono)

    def age(self, at: int, mono: int, run: int) -> int:
        """ms since a row was written, as far as they have certainly passed."""
        return max(0, self.mono - self.clock.born(at, mono, run))

    def append(
        self,
        kind: int,
        client: Name | None,
        topic: Name | None = None,
        flags: int = 0,
        payload: bytes | None = None,
        properties: bytes | None = None,
    ) -> int:
        """Add an entry to the batch and return its seq."""
        batch = self.batch
        seq = self.next_seq
        self.next_seq = seq + 1
        batch.rows.append((seq, self.at, self.mono, self.run, kind, client, topic, flags, payload, properties or None))
        batch.size += ROW_BYTES + len(payload or b"") + len(properties or b"")
        if topic is not None and not topic.id:
            batch.size += NAME_BYTES + 3 * len(topic.text)  # as text, as bytes, and as they are sent
        return seq

    def change(self, sql: str, *parameters: Any) -> None:
        """A change of a state table, in the same transaction; parameters may be `Name`s (their number is meant)."""
        self.batch.changes.append((sql, parameters))
        self.batch.size += 64

    def acknowledge(self, client: Any, packet: Ack) -> None:
        """An acknowledgement that leaves after this commit."""
        self.batch.acks.setdefault(client, []).append(packet)
        self.batch.size += ACK_BYTES

    def when_durable(self, function: Callable[..., None], *arguments: Any) -> None:
        """A call after this commit."""
        self.batch.after.append((function, *arguments))
        self.batch.size += CALL_BYTES + sum([len(argument) for argument in arguments if isinstance(argument, bytes)])

    def take(self) -> Batch:
        """The gathered batch; a new empty one begins."""
        batch = self.batch
        self.batch = Batch(self.next_seq)
        return batch
