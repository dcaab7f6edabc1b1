"""How far one client has come in topics whose stored messages it fetches, and the fetches it waits for. Pure.

Acknowledgements are only noted; `positions` folds them into one number per topic, the end of the contiguous acknowledged
prefix: nothing at or below it waits for the client, neither sent nor still to be fetched.

Invariant: `sent` holds exactly the followed messages that left and were not acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from tidegate.store.msgid import origin
from tidegate.store.topic import matches

if TYPE_CHECKING:
    from tidegate.store.history import Look


END = 1 << 62


class Fetch:
    """Stored messages for one new subscription. It is a cursor: `next`, None until it is known where the window begins."""

    __slots__ = ("first", "look", "next", "piece", "reading", "skip", "stored", "taken", "text", "through")

    def __init__(self, text: str, through: int, cursor: int | None = None) -> None:
        self.text = text
        self.through = through
        self.next = self.first = cursor
        self.stored = cursor or 0
        """The cursor in the store; above `through` when all is acknowledged, and then it is not there any more."""
        self.look: Look | None = None
        self.reading: Any = None
        """The connection for which a piece is being read; an answer for an older one does not count."""
        self.piece: list[Any] = []
        """Read and not sent yet."""
        self.skip: set[int] = set()
        """Goes out as retained message instead."""
        self.taken: set[int] = set()
        """Acknowledged by others since the piece was asked for."""

    def covers(self, seq: int, topic: str) -> bool:
        """Whether this fetch hands out the message, or has."""
        return self.first is not None and self.first <= seq <= self.through and matches(self.text, topic)

    def begin(self, first: int) -> None:
        """It is known where the messages begin."""
        self.first = self.next = first

    def take_out(self, seq: int) -> None:
        """Somebody acknowledged it, and it is not to be sent any more."""
        if self.waits_at() <= seq <= self.through:
            self.taken.add(seq)

    def waits_at(self) -> int:
        """No message below is still to be handed out."""
        return self.piece[0][0] if self.piece else self.next or 0

    def rest(self, under_way: Collection[int]) -> None:
        """The connection is gone: what was not sent is read again."""
        if self.piece:
            self.next = self.piece[0][0]
        self.piece = []
        self.skip.intersection_update(under_way)
        self.reading = None


class Progress:
    """See the module; a session has one as soon as a message of it is followed."""

    __slots__ = ("acked", "addressed", "done", "fetched", "fetches", "has_rows", "names", "pending", "sent")

    def __init__(self) -> None:
        self.sent: dict[int, bytes] = {}
        """seq -> raw topic."""
        self.names: dict[int, bytes] = {}
        """Of those and of `acked`, where far ends are told or a queue gives away: seq -> msgid."""
        self.addressed: dict[int, bytes] = {}
        """Of messages that far ends had for this client, until it acknowledges them: seq -> raw topic."""
        self.acked: dict[bytes, list[int]] = {}
        """Raw topic -> seqs acknowledged since the position was last written."""
        self.fetches: dict[str, Fetch] = {}
        """By filter, until the client unsubscribes."""
        self.pending: list[Fetch] = []
        """Those of them that are not handed out yet, the oldest first."""
        self.fetched: dict[int, None] = {}
        """seqs on their way to the client because they were fetched."""
        self.has_rows = False
        """Whether the store may have rows of fetched deliveries."""
        self.done: dict[int, None] = {}
        """Not to be sent as new: fetched before a restart, or sent as retained."""

    def take_up(self, seq: int, complete: bool) -> None:
        """A fetched message that was on its way before a restart."""
        self.done[seq] = None
        self.has_rows = True
        if not complete:
            self.fetched[seq] = None

    def under_way(self, seq: int) -> None:
        """A fetched message leaves; its row will say so."""
        self.has_rows = True
        self.fetched[seq] = None

    def add(self, fetch: Fetch) -> None:
        self.fetches[fetch.text] = fetch
        self.pending.append(fetch)

    def skip(self, text: str, seqs: list[int]) -> None:
        """These go out as retained messages."""
        if text in self.fetches:
            self.fetches[text].skip.update(seqs)

    def remove(self, text: str) -> Fetch | None:
        fetch = self.fetches.pop(text, None)
        if fetch in self.pending:
            self.handed_out(fetch)
        return fetch

    def handed_out(self, fetch: Fetch) -> None:
        """Nothing of it is still to be sent for the first time."""
        self.pending.remove(fetch)
        if not self.pending:
            self.done.clear()

    def skips(self, seq: int) -> bool:
        """Whether a fetch leaves the message to the retained ones."""
        return any(seq in fetch.skip for fetch in self.pending)

    def is_idle(self) -> bool:
        """Whether there is nothing to remember."""
        noted = self.sent or self.acked or self.addressed or self.fetches or self.fetched or self.done
        return not (noted or self.has_rows)

    def done_with(self) -> int:
        """Rows of deliveries that are complete say nothing new below this seq: cursors and positions are past them."""
        cursors = [fetch.stored for fetch in self.fetches.values() if fetch.stored <= fetch.through]
        return min([*cursors, *map(min, self.acked.values())], default=END)

    def forget_topics(self, gone: Callable[[str], bool]) -> None:
        """The positions of these topics were dropped: what comes back now must not make new ones."""
        self.sent = {seq: raw for seq, raw in self.sent.items() if not gone(raw.decode())}
        self.acked = {raw: seqs for raw, seqs in self.acked.items() if not gone(raw.decode())}
        kept = {*self.sent, *chain.from_iterable(self.acked.values())}
        self.names = {seq: name for seq, name in self.names.items() if seq in kept}

    def give_up(self, seq: int, fetched: bool) -> None:
        """The message can never be sent again."""
        self.sent.pop(seq, None)
        self.names.pop(seq, None)
        self.addressed.pop(seq, None)
        if fetched:
            self.fetched.pop(seq, None)

    def rest(self) -> None:
        """The connection is gone."""
        for fetch in self.pending:
            fetch.rest(self.fetched)

    def positions(self, limit: int) -> Iterator[tuple[bytes, list[int]]]:
        """The topics whose position moved, and what it moved over; what is above a message that waits stays noted.

        From `limit` on the session has still to read.
        """
        if not self.acked:
            return
        lowest: dict[bytes, int] = {}
        for seq, raw in self.sent.items():
            if raw in self.acked and seq < lowest.get(raw, seq + 1):
                lowest[raw] = seq
        for raw, seqs in list(self.acked.items()):
            end = min([limit, lowest.get(raw, END), *self._waiting(raw)])
            reached = [seq for seq in seqs if seq < end]
            if not reached:
                continue
            yield raw, sorted(reached)
            if len(reached) == len(seqs):
                del self.acked[raw]
            else:
                self.acked[raw] = [seq for seq in seqs if seq >= end]

    def names_of(self, seqs: Iterable[int]) -> list[bytes]:
        """Of messages that the position moved over: of each gateway's the last, because each gateway's count by themselves."""
        last: dict[bytes, bytes] = {}
        for seq in seqs:
            name = self.names.pop(seq, b"")
            if name:
                found = origin(name.decode())
                maker = found.code.encode() if found else b""
                last.pop(maker, None)
                last[maker] = name
        return list(last.values())

    def _waiting(self, raw: bytes) -> Iterator[int]:
        return (fetch.waits_at() for fetch in self.pending if matches(fetch.text, raw.decode()))

    def moved_fetches(self) -> Iterator[tuple[Fetch, int]]:
        """Fetches whose cursor is above the stored one, and where it is: above `through` when all is acknowledged."""
        lowest = min(self.fetched, default=END)
        for fetch in self.fetches.values():
            end = fetch.waits_at() if fetch in self.pending else fetch.through + 1
            cursor = min(end, lowest) if lowest <= fetch.through else end
            if fetch.stored < cursor and fetch.stored <= fetch.through:
                yield fetch, min(cursor, fetch.through + 1)
