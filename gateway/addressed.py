"""Messages that far ends had for one client (entries of kind 10), until the client acknowledges them: table `addressed`.

Such an entry belongs to the subscription for which it was found. When that goes, what is not on its way yet is taken back, so
that it may come again with another; what is on its way may still be acknowledged, or be lost with a crash.

Invariant: a message that a session gets no more does not stand here as one that it still gets.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from tidegate.store.history import WITHDRAW_ADDRESSED

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
        for clientid, seq, topic in db.execute(
            "SELECT c.clientid, a.seq, t.name FROM addressed a JOIN client c ON c.id = a.client"
            " LEFT JOIN entry e ON e.seq = a.seq LEFT JOIN topic t ON t.id = e.topic WHERE NOT a.acked"
        ):
            session = self._broker.sessions.get(clientid)
            if session is None or topic is None:
                self._broker.log.change(WITHDRAW_ADDRESSED, seq)
            else:
                session.followed().addressed[seq] = topic.encode()

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
        progress, broker = session.progress, self._broker
        if progress is None or seq not in progress.addressed:  # acknowledged meanwhile
            return False
        if seq in session.inflight.values() or any(seq == sent for sent, _ in session.releasing.values()):
            return False
        low = session.next_seq if session.client is None else session.unread()
        if self.belongs(session, topic, seq) and seq >= min(low, broker.delivery.live + 1):
            return False
        self._take_back(session, seq)
        return True

    def belongs(self, session: Session, topic: Topic, seq: int) -> bool:
        """Whether a subscription is there for which it can have been found."""
        target = self._broker.router.match(session, topic, seq)
        return target is not None and target.qos > 0

    def _take_back(self, session: Session, seq: int) -> None:
        del session.followed().addressed[seq]
        self._broker.log.change(WITHDRAW_ADDRESSED, seq)
