"""The book of sessions: made, resumed, taken over, put to sleep, expired, dropped, and kept in the store.

A session that outlives its connection has a row, and its subscriptions, QoS 2 guards and QoS 2 deliveries have theirs; every
change of them rides in the log's batch. Positions are folded into the row lazily (`fold`): losing one repeats QoS 1
deliveries after a crash, which QoS 1 allows, and never QoS 2, whose rows are kept until the stored cursor is past them.

Invariant: what the store will hold after the current batch is what this book says now, positions aside.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from tidegate.store.few import NO_DICT, NO_LIST, added, without
from tidegate.store.log import Log, Name

from .held import name_bytes, row_bytes
from .routing import Router
from .session import COMPLETE, NEVER, RELEASED, SENT, Session, Subscription

SENT_QOS1 = 4
"""On disk only, written by a clean stop: a QoS 1 delivery that was not acknowledged."""
AS_RETAINED = 8
"""On disk only, added to the state: the packet has the retain flag."""
DONE_BEFORE = 16
"""On disk only, added to the state: the message itself had the packet id too and is done; this is its retained copy."""
ADD_DELIVERY = (
    "INSERT INTO inflight (client, seq, packet_id, state) VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET"
    f" state = excluded.state | CASE state WHEN {COMPLETE} THEN {DONE_BEFORE} ELSE state & {DONE_BEFORE} END"
)
SET_DELIVERY = f"UPDATE inflight SET state = ? | (state & {DONE_BEFORE}) WHERE client = ? AND seq = ? AND packet_id = ?"
ONLY_DONE = f"UPDATE inflight SET state = {COMPLETE} WHERE client = ? AND seq = ? AND packet_id = ? AND state & {DONE_BEFORE}"
DELETE_DELIVERY = "DELETE FROM inflight WHERE client = ?"
AS_FETCHED = 32
"""On disk only, added to the state: fetched for a new subscription, so below the session's cursor from the start."""
FORGET_DELIVERIES = f"{DELETE_DELIVERY} AND seq <= ? AND state & 7 NOT IN ({SENT}, {RELEASED}) AND state < {AS_FETCHED}"
FORGET_FETCHED = f"{DELETE_DELIVERY} AND seq < ? AND state & 7 = {COMPLETE} AND state >= {AS_FETCHED}"


class Sessions:
    """All sessions by client id."""

    def __init__(self, log: Log, router: Router, limit: int = 1 << 62) -> None:
        self._log = log
        self._router = router
        self._limit = limit
        """Bytes that sessions which outlive their connection may take on disk, and half as many the names of others."""
        self.bytes = self.passing = 0
        """How many it is; of the others."""
        self._by_id: dict[str, Session] = {}
        self._awake: dict[Session, None] = {}
        """Connected, or put to sleep since `fold` came by: only their positions move, however many others sleep."""
        self.ended: Callable[[Session], None] = lambda session: None
        """Told of a followed session that is dropped."""
        self.moved: Callable[[Session], None] = lambda session: None
        """Told of a followed session whose cursor is written down: rows that say what was acknowledged above it may go."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_id.values())

    def get(self, clientid: str) -> Session | None:
        return self._by_id.get(clientid)

    def takes(self, clientid: str, persistent: bool) -> bool:
        """Whether there is room on disk for the session of this client, if it needs any that it has not got."""
        before = self._by_id.get(clientid)
        if before is not None and (before.persistent or not persistent):
            return True
        if persistent:
            return self.bytes + _session_bytes(clientid, persistent) <= self._limit
        return self.passing + _session_bytes(clientid, persistent) <= self._limit // 2

    def takes_filter(self, session: Session, text: str) -> bool:
        """Whether there is room on disk for another subscription of this session."""
        return not session.persistent or self.bytes + _filter_bytes(text) <= self._limit

    def _count(self, session: Session, sign: int = 1) -> None:
        """It comes, or (-1) goes."""
        size = sign * _session_bytes(session.name.text, session.persistent)
        if session.persistent:
            self.bytes += size
        else:
            self.passing += size

    def load(self, db: sqlite3.Connection, clean: bool, now: float) -> None:
        """Read every session back; they are asleep. `clean`: the last run was stopped properly.

        `now` is monotonic seconds: what is left of an expiry runs by it, so that no step of the wall clock ends a session.
        What passed since the last run counts as far as it is certain (`store.clock`).
        """
        row = db.execute("SELECT value FROM meta WHERE key = 'suspect'").fetchone()
        suspect = int(row[0]) if clean and row else 0 if clean else self._log.next_seq
        by_number: dict[int, Session] = {}
        for number, clientid, expiry, expires_at, cursor, delivered, expired, dropped in db.execute(
            "SELECT s.client, c.clientid, s.expiry, s.expires_at, s.cursor, s.delivered, s.expired, s.dropped"
            " FROM session s JOIN client c ON c.id = s.client"
        ):
            session = Session(Name(clientid, number), expiry, cursor + 1)
            session.persistent = True
            if expires_at is None and expiry != NEVER:
                expires_at = self._log.now + expiry * 1000  # it was connected when we were killed
            session.expires_at = None if expires_at is None else now + max(0, expires_at - self._log.now) / 1000
            session.behind = True
            session.suspect = suspect
            session.delivered, session.expired, session.dropped = delivered, expired, json.loads(dropped) or NO_DICT
            by_number[number] = self._by_id[clientid] = session
            self._count(session)
        for number, text, options, identifier, since in db.execute(
            "SELECT client, filter, options, identifier, since FROM subscription"
        ):
            subscription = Subscription(options & 3, bool(options & 4), bool(options & 8), identifier or 0, since, options >> 8)
            session = by_number[number]
            session.subscriptions = added(session.subscriptions, text, subscription)
            self.bytes += _filter_bytes(text)
            self._router.subscribe(text, session, subscription)
        for number, seq, packet_id, state in db.execute(
            "SELECT client, seq, packet_id, state FROM inflight ORDER BY client, seq"
        ):
            session = by_number[number]
            if state & AS_FETCHED:
                session.followed().take_up(seq, state & 7 == COMPLETE)
            if state & AS_RETAINED:
                session.retaining = session.retaining or {}
                session.retaining[packet_id] = seq
            if seq >= session.next_seq and (state & DONE_BEFORE or not state & (AS_RETAINED | AS_FETCHED)):
                session.handled = session.handled or {}
                session.handled[seq] = None
            state &= 7
            if state == SENT_QOS1:
                session.inflight, session.kept = session.inflight or {}, session.kept or {}
                session.inflight[packet_id] = session.kept[packet_id] = seq
            elif state != COMPLETE:
                session.releasing = session.releasing or {}
                session.releasing[packet_id] = (seq, state)
        for number, packet_id in db.execute("SELECT client, packet_id FROM received"):
            session = by_number[number]
            session.received = session.received or {}
            session.received[packet_id] = None
        for session in by_number.values():
            found = session.delivered + session.expired + sum(session.dropped.values())
            session.taken = found + len(session.inflight) + len(session.releasing)

    def create(self, name: Name, expiry: int) -> Session:
        """A new session; with a row when it outlives its connection."""
        log = self._log
        session = Session(name, expiry, log.next_seq if expiry else 0)
        self._by_id[name.text] = session
        self._count(session)
        if session.persistent:
            self._awake[session] = None
            log.change(
                "INSERT OR REPLACE INTO session (client, created, expiry, expires_at, cursor) VALUES (?,?,?,NULL,?)",
                name,
                log.now,
                expiry,
                session.stored_cursor,
            )
        return session

    def wake(self, session: Session, expiry: int) -> None:
        """A connection resumes the session, maybe with another expiry."""
        session.expires_at = session.waiting = None
        self._awake[session] = None
        self.set_expiry(session, expiry)

    def moved_asleep(self, session: Session) -> None:
        """Its position changed although it is not connected, and is to be saved."""
        session.dirty = True
        self._awake[session] = None

    def set_expiry(self, session: Session, expiry: int) -> None:
        session.expiry = expiry
        if session.persistent:
            self._log.change("UPDATE session SET expiry = ?, expires_at = NULL WHERE client = ?", expiry, session.name)

    def sleep(self, session: Session, live: int, now: float) -> None:
        """The connection ended and the session goes on: remember where it stands."""
        if session.backlog:
            session.next_seq = session.backlog[0][0]
        elif not session.behind:
            session.next_seq = live + 1
        session.behind = True
        session.backlog = session.retained = session.resend = NO_LIST
        session.retained_due = NO_DICT
        session.rest()
        if session.progress is not None:
            session.progress.rest()
        session.client = None
        session.dirty = True
        if session.expiry != NEVER:
            session.expires_at = now + session.expiry
            wall = self._log.now + session.expiry * 1000
            self._log.change("UPDATE session SET expires_at = ? WHERE client = ?", wall, session.name)
        if session.subscriptions:
            self._router.presence_changed(session)

    def drop(self, session: Session) -> None:
        """The session ends: nothing of it stays."""
        if session.progress is not None:
            self.ended(session)
        if self._by_id.pop(session.name.text, None) is not None:
            self._count(session, -1)
        self._awake.pop(session, None)
        for text in session.subscriptions:
            self._router.unsubscribe(text, session)
            self.bytes -= _filter_bytes(text) if session.persistent else 0
        session.client = None
        # What it was still to get names the session: a circle that the collector comes by for late.
        session.backlog, session.retained, session.retained_due = NO_LIST, NO_LIST, NO_DICT
        if session.persistent:
            for table in ("session", "subscription", "inflight", "received"):
                self._log.change(f"DELETE FROM {table} WHERE client = ?", session.name)

    def expired(self, now: float) -> list[Session]:
        """Sleeping sessions whose expiry has passed."""
        return [s for s in self._by_id.values() if s.expires_at is not None and s.expires_at <= now]

    def subscribe(self, session: Session, text: str, subscription: Subscription) -> bool:
        """Add or replace; whether it is new. A replaced one keeps `since`, so that nothing is skipped."""
        before = session.subscriptions.get(text)
        if before is not None:
            subscription.since = before.since
        session.subscriptions = added(session.subscriptions, text, subscription)
        self._router.subscribe(text, session, subscription)
        if session.persistent:
            self.bytes += _filter_bytes(text) if before is None else 0
            self._log.batch.size += _filter_bytes(text)
            self._log.change(
                "INSERT OR REPLACE INTO subscription (client, filter, options, identifier, since) VALUES (?,?,?,?,?)",
                session.name,
                text,
                subscription.options(),
                subscription.identifier or None,
                subscription.since,
            )
        return before is None

    def unsubscribe(self, session: Session, text: str) -> bool:
        """Take the filter away; whether it was there."""
        if text not in session.subscriptions:
            return False
        session.subscriptions = without(session.subscriptions, text)
        self._router.unsubscribe(text, session)
        if session.persistent:
            self.bytes -= _filter_bytes(text)
            self._log.change("DELETE FROM subscription WHERE client = ? AND filter = ?", session.name, text)
        return True

    def set_delivery(self, session: Session, seq: int, packet_id: int, state: int) -> None:
        """The state of a QoS 2 delivery moves on disk too."""
        if session.persistent:
            self._log.change(SET_DELIVERY, delivery_state(session, seq, packet_id, state), session.name, seq, packet_id)

    def fold(self, live: int, at_most: int | None = None) -> None:
        """Write the positions that moved since the last time."""
        moved = (session for session in self._awake if session.persistent and session.dirty)
        for session in list(islice(moved, at_most)):
            self.keep_position(session, live)

    def keep_position(self, session: Session, live: int) -> None:
        """Write down where the session stands."""
        session.dirty = False
        if session.progress is not None:
            self.moved(session)
        if session.persistent:
            self._store_cursor(session, session.position(live))
        if session.client is None:
            self._awake.pop(session, None)

    def fold_for_stop(self, live: int, room: int = 1 << 62) -> None:
        """A clean stop: positions as handed out, and every delivery that is still unacknowledged.

        For `room` deliveries with QoS 1; a session for which no more is left finds its own as after a crash.
        """
        suspect = max((s.suspect for s in self._by_id.values() if s.position(live) < s.suspect), default=0)
        for session in self._by_id.values():
            if not session.persistent:
                continue
            room -= len(session.inflight)
            if room >= 0:
                self._fold_with_deliveries(session, live)
            else:
                self._store_cursor(session, session.position(live))
                suspect = self._log.next_seq
        self._log.change("INSERT OR REPLACE INTO meta (key, value) VALUES ('suspect', ?)", suspect)

    def _fold_with_deliveries(self, session: Session, live: int) -> None:
        inflight, releasing = session.inflight, session.releasing
        session.inflight = session.releasing = NO_DICT
        self._store_cursor(session, session.position(live))
        session.inflight, session.releasing = inflight, releasing
        rows = [(seq, packet_id, SENT_QOS1) for packet_id, seq in inflight.items()]
        rows += [(seq, packet_id, state) for packet_id, (seq, state) in releasing.items()]
        for seq, packet_id, state in rows:
            self._log.change(ADD_DELIVERY, session.name, seq, packet_id, delivery_state(session, seq, packet_id, state))

    def _store_cursor(self, session: Session, cursor: int) -> None:
        if cursor <= session.stored_cursor:
            return
        session.stored_cursor = cursor
        self.store_account(session)
        done_with = cursor if session.progress is None else min(cursor, session.progress.done_with() - 1)
        self._log.change(FORGET_DELIVERIES, session.name, done_with)

    def store_account(self, session: Session) -> None:
        """What became of its messages, with the cursor as the store has it."""
        dropped = json.dumps(session.dropped) if session.dropped else "{}"
        account = session.stored_cursor, session.delivered, session.expired, dropped
        self._log.change(
            "UPDATE session SET cursor = ?, delivered = ?, expired = ?, dropped = ? WHERE client = ?", *account, session.name
        )


def forget_kept(log: Log, session: Session, packet_ids: Iterable[int]) -> None:
    """Acknowledged, or never to be completed: the packet ids may be used for other messages, which have rows of their own."""
    for packet_id in packet_ids:
        seq = session.kept.pop(packet_id, None)
        if seq is not None:
            log.change(ONLY_DONE, session.name, seq, packet_id)
            log.change(f"{DELETE_DELIVERY} AND seq = ? AND packet_id = ? AND state <> {COMPLETE}", session.name, seq, packet_id)


def _session_bytes(clientid: str, persistent: bool) -> int:
    """Its name, and its rows of `client` and `session`."""
    return name_bytes(clientid) + 2 * row_bytes(0) if persistent else name_bytes(clientid)


def _filter_bytes(text: str) -> int:
    return row_bytes(len(text.encode()))


def delivery_state(session: Session, seq: int, packet_id: int, state: int) -> int:
    """The state of a delivery as its row has it."""
    if session.progress is not None and seq in session.progress.fetched:
        state |= AS_FETCHED
    return state | AS_RETAINED if session.retaining.get(packet_id) == seq else state
