"""The walk through the log of all sessions that fell behind: one read at a time, each for everybody near its place.

Whoever needs more of the log asks, and waits. A read is led in turn by the session that is furthest behind, so that those
before it are joined instead of being read for again, and by the one that has waited longest, so that nobody starves. What comes
of it is handed to all who wait at its place, but only to so many at once that online traffic goes on in between; the reader has
the piece for the others at hand.

Invariant: one read is under way as long as anybody waits, and what sessions hold of the log is bounded for all together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tidegate.store.catchup import BYTES, ROWS
from tidegate.store.piece import MESSAGE, Piece, Stored

from .session import Client, Session

ReadLog = Callable[[Callable[[Any], Any], Callable[[Any], None]], None]
"""`read(job, done)`: run `job(catch_up)` in the reader's thread, then `done(result or exception)` here."""

HELD = 32 << 20
"""Memory that sessions may fill with what they were handed and have not sent yet, about."""
SLICE = 4_000
"""Messages handed out before online traffic has its turn."""
HAND_OVER = 20
"""What handing over itself costs, in messages."""
NEAR = 50_000
"""How far apart sessions may be to be read for together."""
MAX_FILTERS = 2_000
"""With more of them everything is read."""


class Walkers(Protocol):
    """What is needed of the delivery. `live` is the last seq handed to live sessions."""

    live: int

    def hand_over(self, session: Session, client: Client, piece: Piece | None, limit: int) -> int: ...

    def read_failed(self, session: Session, error: Exception) -> None: ...


class Walk:
    """See the module."""

    def __init__(self, read: ReadLog, walkers: Walkers) -> None:
        self._read = read
        self._delivery = walkers
        self._waiting: dict[Session, Client] = {}
        self._walkers: dict[Session, None] = {}
        """Who has asked and has not caught up since."""
        self._under_way = False
        self._lowest = False
        self._last: Piece | None = None
        self._gone: set[int] = set()
        """What the log lets go, and what was read before may still hold."""

    @property
    def limit(self) -> int:
        """Bytes of memory that one session may hold of the log."""
        return min(BYTES + ROWS * MESSAGE, HELD // max(1, len(self._walkers)))

    @property
    def crowded(self) -> bool:
        """Whether there are so many that none reads ahead, and each waits for its turn to send."""
        return len(self._walkers) * 2 * (BYTES + ROWS * MESSAGE) > HELD

    def ask(self, session: Session, client: Client) -> None:
        """This session needs what follows its `next_seq`, or just its turn if it has a backlog."""
        session.reading = client
        self._waiting.pop(session, None)  # another connection: the last in the queue
        self._waiting[session] = client
        self._walkers[session] = None
        if not self._under_way:
            self._go_on()

    def leave(self, session: Session) -> None:
        """It has caught up."""
        self._walkers.pop(session, None)

    def tidy(self) -> None:
        """Called each second: forget who went away."""
        for session in [session for session in self._walkers if session.client is None]:
            del self._walkers[session]

    def left(self, messages: list[Stored]) -> list[Stored]:
        """Those of the messages that the log is not letting go."""
        return [message for message in messages if message[0] not in self._gone] if self._gone else messages

    def give_up(self, gone: set[int], sessions: Iterable[Session]) -> Callable[[], None]:
        """What the log lets go is counted as dropped for these sessions, and they must not get it from memory after that.

        To be called when it is on disk no more: once the reader has let go of its pieces and every answer from before has
        come, nobody can come upon it.
        """
        self._gone |= gone
        for session in sessions:
            if session.backlog:
                session.backlog = self.left(session.backlog)

        def rested(_: Any) -> None:
            self._last = None
            self._read(lambda reader: None, lambda _: self._gone.difference_update(gone))

        return lambda: self._read(lambda reader: reader.rest(), rested)

    def _go_on(self) -> None:
        self._lowest = not self._lowest
        leader = self._leader()
        self._under_way = leader is not None
        if leader is None:
            self._last = None
            return
        last, first, live, filters = self._last, leader.next_seq, self._delivery.live, frozenset(wanted(leader))
        if self._only_turn(leader) or (last is not None and last.serves(first, filters)):
            self._read(lambda reader: last, lambda got: self._have_read(leader, got))
            return
        near, together = self._near(first)
        rows = max(1, self.limit * together // MESSAGE)
        self._read(lambda reader: reader.read(first, live, filters, near, rows), lambda got: self._have_read(leader, got))

    def _leader(self) -> Session | None:
        while self._waiting:
            leader = min(self._waiting, key=_place) if self._lowest else next(iter(self._waiting))
            if leader.client is self._waiting[leader]:
                return leader
            del self._waiting[leader]
        return None

    def _near(self, first: int) -> tuple[set[str], int]:
        """The filters of all who are about to pass here, and how many are here now."""
        filters: set[str] = set()
        together = 0
        for session in self._walkers:
            if abs(session.next_seq - first) <= NEAR:
                together += first <= session.next_seq < first + ROWS
                if len(filters) <= MAX_FILTERS:
                    filters.update(wanted(session))
        return filters if len(filters) <= MAX_FILTERS else {"#"}, together

    def _have_read(self, leader: Session, got: Piece | Exception | None) -> None:
        if isinstance(got, Exception):
            if (client := self._waiting.pop(leader, None)) is not None and leader.client is client:
                leader.reading = None
                self._delivery.read_failed(leader, got)
        else:
            self._last = got
            self._hand_over(leader, got)
        self._go_on()

    def _hand_over(self, leader: Session, piece: Piece | None) -> None:
        handed = 0
        for session in [leader, *self._waiting]:
            client = self._waiting.get(session)
            if client is None or session.client is not client:
                continue
            only_turn = self._only_turn(session)
            if not only_turn and not (piece is not None and _has_next(piece, session)):
                continue
            del self._waiting[session]
            session.reading = None
            handed += HAND_OVER + self._delivery.hand_over(session, client, None if only_turn else piece, self.limit)
            if handed >= SLICE:
                break

    def _only_turn(self, session: Session) -> bool:
        """Whether it needs no more of the log, or not yet."""
        return session.next_seq > self._delivery.live or (bool(session.backlog) and self.crowded)


def wanted(session: Session) -> tuple[str, ...]:
    """Its filters of which anything is kept in the log for it."""
    return tuple([text for text, one in session.subscriptions.items() if one.qos or one.owed >= session.next_seq])


def _has_next(piece: Piece, session: Session) -> bool:
    return piece.first <= session.next_seq <= piece.through and piece.serves(session.next_seq, wanted(session))


def _place(session: Session) -> int:
    return session.next_seq
