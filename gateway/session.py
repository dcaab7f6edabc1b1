"""What the broker knows of a client: `Session`, which survives the network, and `Client`, which is one connection.

A session is a cursor. It is *live* when everything committed has been pushed to it, *behind* when it must read on from the
log at `next_seq` (it was away, its window was full, its socket slow). What is in flight is packet id -> seq; the payload
stays in the log. Pure: no socket, clock or database. Sets are dicts here. Containers begin as the empty one that all share
(`store.few`): whoever puts something in makes one first.

Invariant: everything below `position()` was acknowledged by the client or was not for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.store.few import NO_DICT, NO_LIST, Few
from tidegate.store.log import Name
from tidegate.store.topic import matches

from .mqtt.connection import Connection
from .mqtt.packets import Will
from .progress import END, Progress

SENT = 1
RELEASED = 2
"""States of a QoS 2 delivery: PUBLISH sent; PUBREC arrived and PUBREL is due (4.3.3)."""
COMPLETE = 3
"""Only on disk: done, kept until the session's cursor is past it."""

NEVER = 0xFFFFFFFF
"""Session expiry that never comes (3.1.2.11.2)."""


class Link(Protocol):
    """The wire below a client, as `server` provides it."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def buffered(self) -> int: ...


@dataclass(slots=True)
class Subscription:
    """One topic filter of a session; `since` is the last seq that was given out when it was made."""

    qos: int
    no_local: bool
    retain_as_published: bool
    identifier: int
    since: int
    owed: int = 0
    """It had a higher QoS: of what was stored up to this seq the session is to get, as QoS 0, what it has not had."""

    def options(self) -> int:
        """For the store: the SUBSCRIBE options (3.8.3.1) as one byte, and above it what is owed."""
        return self.qos | self.no_local << 2 | self.retain_as_published << 3 | self.owed << 8


class Client:
    """One network connection. `out` is what it is sent at the end of this turn."""

    __slots__ = (
        "blocked",
        "closing",
        "connection",
        "held",
        "keep_alive",
        "last_seen",
        "link",
        "maximum_packet_size",
        "out",
        "out_size",
        "paused",
        "peer",
        "session",
        "username",
        "version",
        "will",
        "window",
    )

    def __init__(self, link: Link, connection: Connection[Any], peer: str, now: float) -> None:
        self.link = link
        self.connection = connection
        self.peer = peer
        self.session: Session | None = None
        self.username: str | None = None
        self.version = 0
        self.keep_alive = 0
        self.last_seen = now
        self.will: Will | None = None
        self.out: list[bytes] = NO_LIST
        self.out_size = 0
        self.blocked = False
        """The socket does not take more for now."""
        self.paused = False
        """We do not read from it for now."""
        self.held: list[Any] | None = None
        """Events that wait for the CONNACK to leave first."""
        self.closing = False
        self.maximum_packet_size = 0
        self.window = 0
        """How many messages of QoS 1 and 2 it takes at a time."""


class Session:
    """See the module. `name.text` is the client id."""

    __slots__ = (
        "backlog",
        "behind",
        "client",
        "delivered",
        "dirty",
        "dropped",
        "expired",
        "expires_at",
        "expiry",
        "fetching",
        "handled",
        "inflight",
        "kept",
        "matched",
        "name",
        "next_id",
        "next_seq",
        "persistent",
        "plain",
        "progress",
        "reading",
        "received",
        "releasing",
        "resend",
        "retained",
        "retained_due",
        "retaining",
        "stored_cursor",
        "subscriptions",
        "suspect",
        "taken",
        "waiting",
        "window",
    )

    def __init__(self, name: Name, expiry: int, next_seq: int) -> None:
        self.name = name
        self.expiry = expiry
        self.persistent = expiry > 0
        self.client: Client | None = None
        self.subscriptions: Few[str, Subscription] = NO_DICT
        self.matched: dict[bytes, Any] = NO_DICT
        """Raw topic -> what its subscriptions make of it; forgotten when they change."""
        self.inflight: dict[int, int] = NO_DICT
        """QoS 1: packet id -> seq."""
        self.kept: dict[int, int] = NO_DICT
        """QoS 1 deliveries that a clean stop wrote down: packet id -> seq. Their rows go when they are acknowledged."""
        self.releasing: dict[int, tuple[int, int]] = NO_DICT
        """QoS 2: packet id -> (seq, SENT or RELEASED)."""
        self.received: dict[int, None] = NO_DICT
        """Packet ids of QoS 2 messages that came in and were not released yet (4.3.3 method B)."""
        self.window = 0
        """That of its client; 0 if it may begin nothing new (`rows`)."""
        self.next_id = 1
        self.behind = False
        self.next_seq = next_seq
        """Where it reads on, while it is behind."""
        self.reading: Client | None = None
        """The connection for which a piece of the log is being read; an answer for an older one does not count."""
        self.backlog: list[Any] = NO_LIST
        """Read from the log, not sent yet: bounded by two reads."""
        self.plain = -1
        """`Piece.plain` of all that is in the backlog."""
        self.resend: list[tuple[int, int, int]] = NO_LIST
        """After a resume: (seq, packet id, qos) to be sent again before anything new."""
        self.retained: list[Any] = NO_LIST
        """(topic filter, target, message) for new subscriptions, waiting for room: one read of them."""
        self.retained_due: dict[str, Any] = NO_DICT
        """Topic filter -> `retaining.Due`: what is to be found, read and sent next, in this order."""
        self.retaining: dict[int, int] = NO_DICT
        """Packet id -> seq of what left with the retain flag: it has it again when it is sent again (3.3.1.3)."""
        self.fetching: Client | None = None
        """Like `reading`, for retained messages."""
        self.handled: dict[int, None] = NO_DICT
        """After a restart: seqs above the cursor that are in flight or complete, not to be sent as new."""
        self.expires_at: float | None = None
        """Monotonic seconds; None while connected or if never."""
        self.stored_cursor = next_seq - 1
        self.suspect = 0
        """Below this seq a QoS 1 message may have been handed over before a crash: it leaves with the DUP flag (3.3.1.1)."""
        self.dirty = False
        self.taken = 0
        """Messages found for it, see `accounts`: delivered, in flight, expired or dropped by reason."""
        self.delivered = 0
        self.expired = 0
        self.dropped: dict[str, int] = NO_DICT
        self.waiting: Any = None
        """While it is away: what `limits` has counted of what waits for it."""
        self.progress: Progress | None = None
        """Only where rules follow what the client has read."""

    def followed(self) -> Progress:
        """Its progress, from now on if it has none yet."""
        if self.progress is None:
            self.progress = Progress()
        return self.progress

    def is_subscribed(self, topic: str) -> bool:
        return any(matches(text, topic) for text in self.subscriptions)

    def rest(self) -> None:
        """Give back what is empty: its client is idle, or gone."""
        self.matched = NO_DICT
        self.inflight, self.kept = self.inflight or NO_DICT, self.kept or NO_DICT
        self.releasing, self.received = self.releasing or NO_DICT, self.received or NO_DICT
        self.retaining, self.retained_due = self.retaining or NO_DICT, self.retained_due or NO_DICT
        self.handled = self.handled or NO_DICT
        self.backlog, self.resend, self.retained = self.backlog or NO_LIST, self.resend or NO_LIST, self.retained or NO_LIST

    def drop(self, reason: str, count: int = 1) -> None:
        """So many of its messages are given up."""
        if self.dropped is NO_DICT:
            self.dropped = {}
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def free_packet_id(self) -> int:
        """The next packet id that is not in use; the window is far smaller than their number."""
        packet_id = self.next_id
        while packet_id in self.inflight or packet_id in self.releasing:
            packet_id = packet_id % 65_535 + 1
        self.next_id = packet_id % 65_535 + 1
        return packet_id

    def room(self) -> int:
        """How many more QoS 1 and 2 messages may be in flight (receive maximum, 4.9)."""
        return self.window - len(self.inflight) - len(self.releasing)

    def unread(self) -> int:
        """The lowest seq that it has still to read on from the log, a very high one if it is live."""
        if not self.behind:
            return END
        return min(self.next_seq, self.backlog[0][0]) if self.backlog else self.next_seq

    def position(self, live: int) -> int:
        """The cursor: the last seq that need not be looked at again. `live` = last seq handed to live sessions."""
        last = live
        if self.behind or self.client is None:
            last = self.next_seq - 1
        if self.backlog:
            last = min(last, self.backlog[0][0] - 1)
        return min(last, self._before_unacknowledged(last))

    def floor(self, live: int) -> int:
        """Like `position`, as the store would have it after a crash: nothing above is given up."""
        return min(self.stored_cursor, self._before_unacknowledged(live)) if self.persistent else self.position(live)

    def _before_unacknowledged(self, last: int) -> int:
        """The seq before the lowest that was sent and is not acknowledged, `last` if there is none."""
        seqs: Collection[int] = self.inflight.values()
        fetched: Collection[int] = self.progress.fetched if self.progress is not None else ()
        if self.releasing or self.retaining or fetched:
            sent = [(packet_id, seq) for packet_id, (seq, state) in self.releasing.items() if state == SENT]
            # What left as retained or was fetched may be as old as it likes: it holds no cursor back.
            both = (*self.inflight.items(), *sent)
            seqs = [seq for packet_id, seq in both if self.retaining.get(packet_id) != seq and seq not in fetched]
        return min(seqs) - 1 if seqs else last
