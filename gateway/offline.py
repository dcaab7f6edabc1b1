"""Stored messages for those who were not there: `on_message_fetch`, `on_message_acked`, `on_acked_delete` on the box's own log.

A new subscription that a rule names gets a `Fetch`, which reads the log like a session that fell behind: in order, in pieces,
within the client's window. Until it is handed out the session counts as behind, so newer messages follow the older ones. Of a
session that survives it is a row, its QoS 2 deliveries have their rows as always, and both together make a crash harmless.
Acknowledgements are noted in memory and folded into positions now and then; those of QoS 2 and of queues in the commit that the
client's answer waits for.

Invariant: a position never passes a message that the client has still to get or to acknowledge, and never goes back.
"""

from __future__ import annotations

import json
import sqlite3
from itertools import islice
from typing import TYPE_CHECKING, Any

from tidegate.store.catchup import Fetched
from tidegate.store.entry import KEPT_THERE, POSITION
from tidegate.store.foreign import name_of
from tidegate.store.history import (
    ACK_ADDRESSED,
    ADD_FETCH,
    DELETE_FETCH,
    DELETE_FETCHES,
    FORGET_ADDRESSED,
    FORGET_POSITIONS,
    MOVE_FETCH,
    NOTE_FORGOTTEN,
    SET_POSITION,
    STALE_POSITIONS,
    TAKE,
    WITHDRAW_ADDRESSED,
    IsOld,
    Look,
    Question,
    look_back,
    read_history,
)
from tidegate.store.local import PUBSUB, QUEUE, TOLD, FetchRule
from tidegate.store.log import Name
from tidegate.store.piece import Stored
from tidegate.store.report import INFO
from tidegate.store.topic import filters_overlap, is_wild, matches

from .outlet import TURN_BYTES
from .progress import END, Fetch, Progress
from .routing import Topic, target_of
from .session import COMPLETE, RELEASED, Client, Session
from .sessions import FORGET_FETCHED
from .walk import ReadLog

if TYPE_CHECKING:
    from .broker import Broker

HELD = 4 << 20
"""Memory for what is read and not sent yet, shared by all who fetch, about."""
SWEEP_PAUSE = 3600.0
STALE_AGE = 30 * 86_400_000
"""ms after which the position of a client without a session is forgotten, if its message is gone too."""


class Offline:
    """See the module."""

    def __init__(self, broker: Broker, read: ReadLog) -> None:
        self._broker = broker
        self._read = read
        self._dirty: dict[Session, None] = {}
        self._urgent: dict[Session, None] = {}
        self._under_way: dict[Fetch, Session] = {}
        """Those that are being read or sent: what somebody takes out of a queue meanwhile is taken out of them too."""
        self._next_sweep = 0.0
        broker.sessions.ended = self.ended
        broker.sessions.moved = self._fold
        broker.delivery.feed = self.feed

    def load(self, db: sqlite3.Connection) -> None:
        """Read back the fetches of sessions, after the sessions."""
        rows = db.execute("SELECT c.clientid, f.filter, f.cursor, f.through FROM fetch f JOIN client c ON c.id = f.client")
        for clientid, text, cursor, through in rows:
            session = self._broker.sessions.get(clientid)
            if session is not None:
                session.followed().add(Fetch(text, through, cursor))
        self._load_deliveries(db)
        self._load_addressed(db)

    def _load_deliveries(self, db: sqlite3.Connection) -> None:
        """What was acknowledged above a position, and what is still to be: the rows of QoS 2 know it.

        What a far end had as retained message is not followed: it says nothing of how far the client has read.
        """
        for clientid, seq, topic, state, at, run, flags, properties in db.execute(
            "SELECT c.clientid, i.seq, t.name, i.state & 7, e.at, e.run, e.flags, e.properties FROM inflight i"
            " JOIN client c ON c.id = i.client JOIN entry e ON e.seq = i.seq JOIN topic t ON t.id = e.topic"
            " WHERE e.kind <> ? ORDER BY i.client, i.seq",
            (KEPT_THERE,),
        ):
            session, raw = self._broker.sessions.get(clientid), topic.encode()
            if session is None:
                continue
            self._dirty[session] = None
            if not session.followed().pending:
                session.followed().done.clear()
            session.followed().names[seq] = name_of(flags, properties) or self._broker.message_id(seq, at, run)
            if state in (RELEASED, COMPLETE):
                session.followed().acked.setdefault(raw, []).append(seq)
            else:
                session.followed().sent[seq] = raw

    def _load_addressed(self, db: sqlite3.Connection) -> None:
        """Messages of far ends that a client has still to acknowledge; not those of sessions that a crash has ended."""
        for clientid, seq, topic in db.execute(
            "SELECT c.clientid, a.seq, t.name FROM addressed a JOIN client c ON c.id = a.client"
            " LEFT JOIN entry e ON e.seq = a.seq LEFT JOIN topic t ON t.id = e.topic WHERE NOT a.acked"
        ):
            session = self._broker.sessions.get(clientid)
            if session is None or topic is None:
                self._broker.log.change(WITHDRAW_ADDRESSED, seq)
            else:
                session.followed().addressed[seq] = topic.encode()

    # -- subscriptions ---------------------------------------------------------------------------------------------

    def subscribed(self, session: Session, text: str, through: int) -> None:
        """A new subscription with QoS > 0; `through`: the last seq before it."""
        if self._broker.router.local.fetch_for(text) is None:
            return
        session.followed().add(Fetch(text, through))
        if session.persistent:
            self._broker.log.change(ADD_FETCH, session.name, text, through)
        live = self._broker.delivery.live
        if session.client is not None and not session.behind:
            session.behind = True
            session.next_seq = live + 1
        self._broker.sessions.keep_position(session, live)  # the reader looks for positions in the store

    def unsubscribed(self, session: Session, text: str) -> None:
        self._fold(session, leaving=text)  # what far ends are told of it stands before the UNSUBSCRIBE
        broker, progress = self._broker, session.progress
        if progress is not None and (fetch := progress.remove(text)) is not None:
            self._under_way.pop(fetch, None)
            self._urgent[session] = None
            if session.persistent:
                broker.log.change(DELETE_FETCH, session.name, text)
        self._take_over(session, text)
        self._withdraw(session)

    def forget_positions(self, session: Session, text: str, seq: int) -> None:
        """After `unsubscribed`; `seq`: the entry that tells far ends of it, 0 if none does."""
        broker, progress = self._broker, session.progress
        if not broker.router.local.forgets_position(text):
            return
        if progress is not None:
            progress.forget_topics(lambda topic: matches(text, topic) and not session.is_subscribed(topic))
        which = session.name, text, json.dumps(list(session.subscriptions))
        if seq and is_wild(text):
            broker.log.change(NOTE_FORGOTTEN, *which, seq)
        broker.log.change(FORGET_POSITIONS, *which)

    def _withdraw(self, session: Session) -> None:
        """What no subscription of the client brings any more, so that it may come again with another."""
        progress = session.progress
        if progress is None or not progress.addressed:
            return
        sent = {*session.inflight.values(), *(seq for seq, _ in session.releasing.values())}
        for seq, raw in list(progress.addressed.items()):
            if seq not in sent and not session.is_subscribed(raw.decode()):
                del progress.addressed[seq]
                self._broker.log.change(WITHDRAW_ADDRESSED, seq)

    def _take_over(self, session: Session, gone: str) -> None:
        """What the subscription that is gone had still to bring is fetched by others that match it too."""
        rules = self._broker.router.local
        mine = [
            text for text, subscription in session.subscriptions.items() if subscription.qos and filters_overlap(text, gone)
        ]
        again = [text for text in mine if rules.ack_of(text) and rules.fetch_for(text) is not None]
        for text in again:
            session.followed().remove(text)
            self.subscribed(session, text, session.subscriptions[text].since)
        if again:
            self._broker.when_durable(self.begin, session)

    def ended(self, session: Session) -> None:
        """The session is dropped."""
        self._fold(session)
        if session.persistent:
            self._broker.log.change(DELETE_FETCHES, session.name)
        if session.progress is not None and session.progress.addressed:
            self._broker.log.change(FORGET_ADDRESSED, session.name)
        session.progress = None
        self._dirty.pop(session, None)
        self._urgent.pop(session, None)

    def begin(self, session: Session) -> None:
        """What was logged before the subscriptions is on the disk now: fetch."""
        if session.progress is not None:
            self._broker.delivery.pump(session)

    # -- acknowledgements ------------------------------------------------------------------------------------------

    def acked(self, session: Session, progress: Progress, seq: int) -> None:
        """PUBACK, or the first PUBREC."""
        if progress.addressed and progress.addressed.pop(seq, None) is not None:
            self._broker.log.change(ACK_ADDRESSED, self._broker.log.now, seq)
            self._dirty[session] = None
        raw = progress.sent.pop(seq, None)
        if raw is None:
            return
        what = self._broker.router.fresh(self._broker.router.topics[raw]).acks
        if what & QUEUE:
            self._broker.log.change(TAKE, seq)
            for fetch in self._under_way:
                fetch.take_out(seq)
        if what & (PUBSUB | TOLD):
            progress.acked.setdefault(raw, []).append(seq)
        else:
            progress.names.pop(seq, None)
        self._dirty[session] = None

    def acked_qos1(self, session: Session, progress: Progress, seq: int) -> None:
        self.acked(session, progress, seq)
        self.completed(session, progress, seq)

    def acked_qos2(self, session: Session, progress: Progress, seq: int) -> None:
        """The position is in the same commit as the delivery's state: the client is never sent it again."""
        self.acked(session, progress, seq)
        if session in self._dirty:
            self._urgent[session] = None

    def completed(self, session: Session, progress: Progress, seq: int) -> None:
        """The exchange is over."""
        if seq in progress.fetched:
            del progress.fetched[seq]
            if progress.skips(seq):
                progress.done[seq] = None
            self._dirty[session] = None

    # -- folding ---------------------------------------------------------------------------------------------------

    def fold_urgent(self) -> None:
        """A commit begins: what must be in it."""
        if self._urgent:
            urgent, self._urgent = self._urgent, {}
            for session in urgent:
                self._fold(session)

    def fold(self, at_most: int | None = None) -> None:
        """Write what moved since the last time."""
        for session in list(islice(self._dirty, at_most)):
            self._fold(session)

    def tick(self) -> None:
        """Once a second."""
        self.fold()
        self._forget_those_who_left()
        broker = self._broker
        if broker.router.local.acks and broker.now >= self._next_sweep:
            self._next_sweep = broker.now + SWEEP_PAUSE
            broker.log.change(STALE_POSITIONS, broker.log.now - STALE_AGE)

    def _forget_those_who_left(self) -> None:
        for fetch, session in list(self._under_way.items()):
            if session.client is None or session.progress is None or fetch not in session.progress.pending:
                del self._under_way[fetch]
                fetch.taken.clear()

    def _fold(self, session: Session, leaving: str = "") -> None:
        self._dirty.pop(session, None)
        progress, log = session.progress, self._broker.log
        if progress is None:
            return
        topics = self._broker.router.topics
        for raw, reached in progress.positions(session.unread()):
            if self._has_position(session, topics[raw], leaving):
                log.change(SET_POSITION, self._name(session), topics[raw], reached[-1], log.now)
                self._broker.rows.add_position()
            names = progress.names_of(reached)
            if self._is_told(session, topics[raw], leaving):
                for name in names:
                    log.append(POSITION, self._name(session), topics[raw], 0, name)
        for fetch, cursor in list(progress.moved_fetches()):
            fetch.stored = cursor
            if session.persistent:
                if cursor > fetch.through:
                    log.change(DELETE_FETCH, session.name, fetch.text)
                else:
                    log.change(MOVE_FETCH, cursor, session.name, fetch.text)
        if progress.has_rows and session.persistent:
            low = progress.done_with()
            log.change(FORGET_FETCHED, session.name, low)
            progress.has_rows = low < END or bool(progress.fetched)
        if progress.acked:
            self._dirty[session] = None
        elif progress.is_idle():
            session.progress = None

    def _has_position(self, session: Session, topic: Topic, leaving: str) -> bool:
        """By the rules; one that an UNSUBSCRIBE dropped does not come back with what was still under way."""
        router = self._broker.router
        dropped = router.local.forgets_position(topic.text) and not self._is_subscribed(session, topic, leaving)
        return bool(router.fresh(topic).acks & PUBSUB) and not dropped

    def _is_told(self, session: Session, topic: Topic, leaving: str) -> bool:
        """Whether far ends hear of the position: not after the UNSUBSCRIBE, which may have dropped it there."""
        if not self._broker.router.fresh(topic).acks & TOLD:
            return False
        return self._is_subscribed(session, topic, leaving)

    def _is_subscribed(self, session: Session, topic: Topic, leaving: str) -> bool:
        """Or was until now, by the filter that is `leaving`."""
        return session.is_subscribed(topic.text) or bool(leaving and matches(leaving, topic.text))

    def _name(self, session: Session) -> Name:
        """As long as the session is in the book its name keeps its number."""
        current = self._broker.sessions.get(session.name.text)
        return session.name if current is session else Name(session.name.text)

    # -- handing out -----------------------------------------------------------------------------------------------

    def feed(self, session: Session, progress: Progress, client: Client) -> bool:
        """Hand out what the first pending fetch has; False when the log must be read first."""
        fetch = progress.pending[0]
        # Retained messages first: only what was sent as such need not be fetched.
        if fetch.reading is client or session.retained or session.retained_due:
            return False
        if fetch.through > self._broker.delivery.durable:  # `begin` comes when it is
            return False
        if fetch.piece:
            self._send(session, progress, client, fetch)
            return True
        rule = self._broker.router.local.fetch_for(fetch.text)
        if rule is None or (fetch.next is not None and fetch.next > fetch.through):
            progress.handed_out(fetch)
            self._under_way.pop(fetch, None)
            self._dirty[session] = None
            return True
        self._read_on(session, client, fetch, rule)
        return False

    def _read_on(self, session: Session, client: Client, fetch: Fetch, rule: FetchRule) -> None:
        is_old = self._older_than(rule.span) if rule.span else None
        question = Question(session.name.text, fetch.text, fetch.through, rule.queue, rule.limit, is_old, rule.window_first)
        fetch.reading = client
        self._under_way[fetch] = session
        if rule.queue and fetch.first is None:
            fetch.begin(1)
        if fetch.next is None:
            look = fetch.look
            self._read(lambda reader: look_back(reader, question, look), lambda got: self._looked(session, client, fetch, got))
        else:
            first, limit = fetch.next, HELD // len(self._under_way)
            self._read(
                lambda reader: read_history(reader, question, first, limit),
                lambda got: self._have_read(session, client, fetch, got),
            )

    def _older_than(self, age: int) -> IsOld:
        clock, born_before = self._broker.log.clock, self._broker.log.mono - age
        return lambda *born: clock.born(*born) < born_before

    def _looked(self, session: Session, client: Client, fetch: Fetch, got: Look | Exception) -> None:
        if not self._is_still_wanted(session, client, fetch, got):
            return
        assert isinstance(got, Look)
        fetch.look = got
        if got.chosen and got.over:
            fetch.begin(got.first)
            self._urgent[session] = None  # with the first rows of its deliveries
            if got.skipped:
                self._broker.delivery.dropped["offline_opts"] += got.skipped
                name, text = session.name.text, "a client gets only the newest of the stored messages that it has not read"
                fields = {"client": name, "filter": fetch.text, "count": got.found, "passed_over": got.skipped}
                self._broker.report("fetch_cut", text, INFO, f"offline_opts {name}", **fields)
        self._broker.delivery.pump(session)

    def _have_read(self, session: Session, client: Client, fetch: Fetch, got: Fetched | Exception) -> None:
        if not self._is_still_wanted(session, client, fetch, got):
            return
        assert isinstance(got, Fetched)
        under_way = {*session.inflight.values(), *(seq for seq, _ in session.releasing.values())}
        due = [message for message in got.messages if self._is_due(session, fetch, message)]
        fetch.piece = [message for message in due if message[0] not in under_way]
        fetch.next = got.through + 1
        # Sent for a subscription that is no more: the fetch is not over before the client has it.
        for message in due:
            if message[0] in under_way:
                session.followed().under_way(message[0])
        self._broker.delivery.pump(session)

    def _is_still_wanted(self, session: Session, client: Client, fetch: Fetch, got: Any) -> bool:
        if fetch.reading is client:
            fetch.reading = None
        progress = session.progress
        if session.client is not client or progress is None or fetch not in progress.pending:
            return False
        if isinstance(got, Exception):
            self._broker.delivery.read_failed(session, got)
            return False
        return True

    def _send(self, session: Session, progress: Progress, client: Client, fetch: Fetch) -> None:
        """As much of the piece as window and socket take."""
        target = target_of(session, session.subscriptions[fetch.text])
        sent = 0
        while sent < len(fetch.piece) and session.room() > 0 and client.out_size <= TURN_BYTES and not client.blocked:
            message = fetch.piece[sent]
            seq = message[0]
            sent += 1
            if seq in fetch.taken:
                continue
            progress.under_way(seq)
            if not self._broker.delivery.send_old(session, client, message, target):
                del progress.fetched[seq]
        del fetch.piece[:sent]
        self._dirty[session] = None

    def _is_due(self, session: Session, fetch: Fetch, message: Stored) -> bool:
        """Whether the client has it, or gets it, in no other way."""
        seq, raw, *_ = message
        progress = session.followed()
        if seq in fetch.skip or seq in progress.done or seq in progress.acked.get(raw, ()):
            return False
        router = self._broker.router
        topic = router.topics[raw]
        if self._broker.log.age(*message[6:]) > router.local.age_of(topic.text):
            return False
        if any(other is not fetch and other.covers(seq, topic.text) for other in _before(progress, fetch)):
            return False
        older = router.match(session, topic, seq)
        return older is None or not older.qos


def _before(progress: Progress, fetch: Fetch) -> list[Fetch]:
    """The fetches that were asked for before this one."""
    fetches = list(progress.fetches.values())
    return fetches[: fetches.index(fetch)]
