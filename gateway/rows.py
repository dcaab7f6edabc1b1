"""Rows of log.db that go with no message: QoS 2 exchanges of sessions that survive, and positions. Together they have a limit.

An exchange ends when its client answers, so a client that never does leaves rows for ever. As they become many, sessions with
more than an equal share begin nothing new with QoS 2, and at the limit none does: a publish is refused (`pressure`), a
subscriber waits with a window of 0 and ends what it has begun. Of positions the oldest go: their clients may fetch again what
they had.

A session that ends with its connection has its guards in memory only: they are counted by themselves, with the same limit.

How many rows went with a cursor only the store knows. What is added is counted here, and when that is much the reader counts.

Invariant: `exchanges` and `positions` are never less than what is there, and nothing is refused before the reader has counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from tidegate.store.report import INFO, WARNING

from .session import Session

if TYPE_CHECKING:
    from .broker import Broker

ROW = 64
"""Bytes that a row takes at most, its place in an index included."""
MANY, FULL_UNTIL = 0.75, 0.9
"""Parts of the limit: above the one shares hold; a limit that was reached is over below the other."""
LEFT = 0.8
"""Part of the limit that stays of the positions."""
AT_ONCE = 20_000
PAUSE = 5.0
"""Seconds between two counts while there are many."""
FORGET_SESSIONLESS = (
    "DELETE FROM position WHERE id IN (SELECT id FROM position WHERE client NOT IN (SELECT client FROM session)"
    " ORDER BY id LIMIT ?)"
)
FORGET_OLDEST = "DELETE FROM position WHERE id IN (SELECT id FROM position ORDER BY id LIMIT ?)"
PIECE = 20_000
"""Rows of one look: a reader's transaction holds the write-ahead log back."""
_HELD = {
    "received": """
SELECT client, count(*), max(packet_id) FROM (SELECT client, packet_id FROM received
  WHERE (client, packet_id) > (?, ?) ORDER BY client, packet_id LIMIT ?) GROUP BY client""",
    "inflight": """
SELECT client, count(*), max(seq << 16 | packet_id) FROM (SELECT client, seq, packet_id FROM inflight
  WHERE (client, seq, packet_id) > (?1, ?2 >> 16, ?2 & 65535) ORDER BY client, seq, packet_id LIMIT ?3) GROUP BY client""",
}
"""Of each client its rows in this piece and the last one's key."""


class Found(NamedTuple):
    """`large`: numbers of the clients that would have more than an equal share if one more came."""

    exchanges: int
    positions: int
    large: frozenset[int] = frozenset()


class Rows:
    """See the module; `limit` in bytes, half of it for either kind."""

    def __init__(self, broker: Broker, limit: int) -> None:
        self.exchanges = self.positions = self.passing = 0
        self._broker = broker
        self._limit = limit // 2 // ROW
        self._large: frozenset[int] = frozenset()
        self._full = self._asked = False
        self._next = 0.0
        self._stood = 0
        """How many positions there were when some were taken away last."""

    def load(self, db: Any) -> None:
        """Count what is there at the start."""
        self._have(_count(db))

    def add_exchange(self) -> None:
        self.exchanges += 1
        if self.exchanges > self._limit * MANY:
            self._ask()

    def add_position(self) -> None:
        """Or it moved: nobody knows."""
        self.positions += 1
        if self.positions > self._limit:
            self._ask()

    def tick(self) -> None:
        """Called each second."""
        if self._full or self._large or self.positions > self._limit:
            self._ask()
        broker = self._broker
        if self.passing > self._limit * MANY:
            self._say_full("connections without a session that lasts", self.passing)
        if broker.router.level is None:
            broker.pressure.let_send_again(lambda client: client.session is None or not self.stalls(client.session))

    @property
    def full(self) -> bool:
        """Whether anybody is refused."""
        return self._full or bool(self._large) or self.passing > self._limit * MANY

    @property
    def room(self) -> int:
        """For so many exchanges more, at least; a clean stop writes down those of QoS 1 as well."""
        return max(0, self._limit - self.exchanges)

    def stalls(self, session: Session) -> bool:
        """Whether the session may begin nothing new with QoS 2."""
        if session.persistent:
            return self._full or session.name.id in self._large
        if self.passing <= self._limit * MANY:
            return False
        return self.passing >= self._limit or len(session.received) * len(self._broker.clients) >= self._limit

    def settle(self, session: Session) -> None:
        """Give the session its window, or none."""
        if session.client is not None:
            waits = self.stalls(session) and any(one.qos == 2 for one in session.subscriptions.values())
            session.window = 0 if waits else session.client.window

    def _ask(self) -> None:
        broker = self._broker
        if not self._asked and broker.now >= self._next:
            self._asked = True
            before = self.exchanges, self.positions
            broker.when_durable(lambda: broker.read(lambda reader: _count(reader.db), lambda got: self._counted(got, *before)))

    def _counted(self, got: Found | Exception, exchanges: int, positions: int) -> None:
        """What was added since it was asked may be in the answer or not."""
        self._asked = False
        if isinstance(got, Exception):
            return  # a disk that cannot be read is told elsewhere; asked again with the next row
        added = self.exchanges - exchanges, self.positions - positions
        self._have(Found(got.exchanges + added[0], got.positions + added[1], got.large))

    def _have(self, found: Found) -> None:
        self.exchanges, self.positions, _ = found
        were_full = self._full or self._large
        self._full = found.exchanges >= self._limit * (FULL_UNTIL if self._full else 1)
        self._large = found.large if found.exchanges > self._limit * MANY else frozenset()
        if self._full or self._large or self.positions > self._limit:
            self._next = self._broker.now + PAUSE
        if were_full or self._full or self._large:
            self._tell()
        if self.positions > self._limit:
            self._forget_positions()

    def _tell(self) -> None:
        broker = self._broker
        if self._full or self._large:
            self._say_full("every session" if self._full else "sessions with more than an equal share", self.exchanges)
        else:
            broker.report("exchanges_flow", "there is room for QoS 2 again", INFO, "")
        for session in [client.session for client in broker.clients if client.session is not None]:
            self.settle(session)
            if session.behind and session.window:
                broker.delivery.pump(session)

    def _say_full(self, who: str, rows: int) -> None:
        text = "max_exchange_bytes is used up: nothing new begins with QoS 2 before clients end what they have begun"
        self._broker.report("exchanges_full", text, WARNING, "", concerns=who, rows=rows)

    def _forget_positions(self) -> None:
        """The oldest of clients without a session, and of all if that was not enough."""
        sql = FORGET_OLDEST if 0 < self._stood <= self.positions else FORGET_SESSIONLESS
        count = min(self.positions - int(self._limit * LEFT), AT_ONCE)
        self._stood = self.positions
        self._broker.log.change(sql, count)
        self._broker.counters["positions_forgotten"] += count
        text = "max_exchange_bytes is used up: the oldest positions go, and their clients may get again what they had"
        self._broker.report("positions_forgotten", text, WARNING, rows=self.positions)


def _count(db: Any) -> Found:
    held: Counter[int] = Counter()
    for sql in _HELD.values():
        last, counted = (0, 0), PIECE
        while counted == PIECE:
            found = db.execute(sql, (*last, PIECE)).fetchall()
            counted = sum(count for _, count, _ in found)
            for client, count, key in found:
                held[client] += count
                last = client, key
    (positions,) = db.execute("SELECT count(*) FROM position").fetchone()
    total = held.total()
    return Found(total, positions, frozenset([client for client, count in held.items() if count * (len(held) + 1) > total]))
