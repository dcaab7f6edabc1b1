"""Messages that far ends had for one client (entries of kind 10), until the client acknowledges them: table `addressed`.

Such an entry belongs to the subscription for which it was found. When that goes, what is not on its way yet is taken back, so
that it may come again with another; what is on its way may still be acknowledged, or be lost with a crash.

A crash loses what was on its way for a subscription that is gone. It is in the log still: where there is another one for it,
it is logged anew at the next start, because what is acknowledged of that one moves the client's position past it.

Invariant: a message that a session gets no more does not stand here as one that it still gets.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from tidegate.store.entry import ADDRESSED
from tidegate.store.history import ADD_ADDRESSED, WITHDRAW_ADDRESSED

from .routing import Topic
from .session import Session

if TYPE_CHECKING:
    from .broker import Broker


class Addressed:
    """See the module."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def load(self, db: sqlite3.Connection) -> None:
        """What clients have still to acknowledge; not those whose sessions a crash has ended."""
        for clientid, seq, msgid, topic in db.execute(
            "SELECT c.clientid, a.seq, a.msgid, t.name FROM addressed a JOIN client c ON c.id = a.client"
            " LEFT JOIN entry e ON e.seq = a.seq LEFT JOIN topic t ON t.id = e.topic WHERE NOT a.acked ORDER BY a.seq"
        ):
            session = self._broker.sessions.get(clientid)
            if session is None or topic is None:
                self._broker.log.change(WITHDRAW_ADDRESSED, seq)
                continue
            session.followed().addressed[seq] = topic.encode()
            name = self._broker.router.topics[topic.encode()]
            if self._is_lost(session, name, seq):
                self._take_back(session, seq)
                if self.belongs(session, name, self._broker.log.next_seq):
                    entry = db.execute("SELECT flags, payload, properties FROM entry WHERE seq = ?", (seq,)).fetchone()
                    self.add(session, name, msgid, *entry)

    def add(self, session: Session, topic: Topic, msgid: str, flags: int, payload: bytes, properties: bytes) -> None:
        """From here on it is in the log for this session."""
        log = self._broker.log
        seq = log.append(ADDRESSED, session.name, topic, flags, payload, properties)
        log.change(ADD_ADDRESSED, seq, session.name, msgid)
        session.followed().addressed[seq] = topic.raw

    def withdraw(self, session: Session) -> None:
        """A subscription went: what none of the client's brings any more."""
        progress = session.progress
        if progress is None or not progress.addressed:
            return
        sent = {*session.inflight.values(), *(seq for seq, _ in session.releasing.values())}
        for seq, raw in list(progress.addressed.items()):
            if seq not in sent and not session.is_subscribed(raw.decode()):
                self._take_back(session, seq)

    def withdraw_stranded(self, session: Session, topic: Topic, seq: int) -> bool:
        """Take back a message that was on its way when its subscription went, and that a crash then lost; whether it was so."""
        progress = session.progress
        if progress is None or seq not in progress.addressed:  # acknowledged meanwhile
            return False
        if not self._is_lost(session, topic, seq):
            return False
        self._take_back(session, seq)
        return True

    def _is_lost(self, session: Session, topic: Topic, seq: int) -> bool:
        """Whether it was on its way when its subscription went, and neither is any more nor comes again."""
        if seq in session.inflight.values() or any(seq == sent for sent, _ in session.releasing.values()):
            return False
        low = session.next_seq if session.client is None else session.unread()
        return not self.belongs(session, topic, seq) or seq < min(low, self._broker.delivery.live + 1)

    def belongs(self, session: Session, topic: Topic, seq: int) -> bool:
        """Whether a subscription is there for which it can have been found."""
        target = self._broker.router.match(session, topic, seq)
        return target is not None and target.qos > 0

    def _take_back(self, session: Session, seq: int) -> None:
        del session.followed().addressed[seq]
        self._broker.log.change(WITHDRAW_ADDRESSED, seq)
