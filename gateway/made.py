"""Subscriptions made for a client, by an operator or a business system: the rows of `mqtt_sub`, and `on_subscribe_lookup`.

The whole table is in memory, the broker being its only writer. A row becomes a subscription when its client connects (as the
rules say), or at once when its session is there; both go the way of a SUBSCRIBE, with the same checks, without a SUBACK. What
was found at a connect is in one commit with the session, so a crash never leaves a session without them.

Invariant: a change is answered when it is durable.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

from tidegate.store.report import WARNING
from tidegate.store.topic import topic_filter_fault

from .mqtt.packets import Subscription as Requested
from .session import Session
from .subscribing import Made, Subscribing

if TYPE_CHECKING:
    from .broker import Broker

ADD = (
    "INSERT INTO proxy_subscription (clientid, topic, qos, created) VALUES (?,?,?,?)"
    " ON CONFLICT (clientid, topic) DO UPDATE SET qos = excluded.qos"
)
DELETE = "DELETE FROM proxy_subscription WHERE clientid = ? AND topic = ?"
MAX_CLIENT_ID = 65_535


class MadeSubscriptions:
    """See the module."""

    def __init__(self, broker: Broker, subscribing: Subscribing) -> None:
        self._broker = broker
        self._subscribing = subscribing
        self._rows: dict[str, dict[str, int]] = {}

    def load(self, db: sqlite3.Connection) -> None:
        for clientid, topic_filter, qos in db.execute("SELECT clientid, topic, qos FROM proxy_subscription ORDER BY id"):
            self._rows.setdefault(clientid, {})[topic_filter] = qos

    def look_up(self, session: Session, new: bool) -> list[Made]:
        """At a connect: make the subscriptions that the session has not got; what they bring is sent after the CONNACK."""
        rules = self._broker.router.local
        rows = self._rows.get(session.name.text)
        if rows is None or not (rules.lookup_always or (new and rules.lookup_new)):
            return []
        missing = [(text, qos) for text, qos in rows.items() if text not in session.subscriptions]
        return [made for text, qos in missing if (made := self._make(session, text, qos)) is not None]

    def _make(self, session: Session, topic_filter: str, qos: int) -> Made | None:
        if fault(session.name.text, topic_filter, qos):
            self._broker.counters["lookup_refused"] += 1
            return None
        made = self._subscribing.subscribe(session, Requested(topic_filter, qos, False, False, 0))
        if isinstance(made, Made):
            return made
        self._broker.counters["lookup_refused"] += 1
        name, text = session.name.text, "a client may not have a subscription that was made for it"
        self._broker.report(
            "lookup_refused", text, WARNING, f"lookup {name}", client=name, filter=topic_filter, reason=made.name.lower()
        )
        return None

    def add(self, clientid: str, topic_filter: str, qos: int, done: Callable[[], None]) -> bool:
        """Add a row, or give it another QoS. A session that is there has the subscription at once; False if it may not."""
        broker = self._broker
        self._rows.setdefault(clientid, {})[topic_filter] = qos
        broker.log.change(ADD, clientid, topic_filter, qos, broker.log.now)
        session = broker.sessions.get(clientid) if broker.router.local.lookup else None
        made = self._make(session, topic_filter, qos) if session is not None else None
        if session is not None and made is not None:
            self._subscribing.bring(session, [made])
        broker.when_durable(done)
        broker.turn_over()
        return session is None or made is not None

    def remove(self, clientid: str, topic_filter: str, done: Callable[[], None]) -> bool:
        """Take a row away, and the subscription from a session that is there; whether there was a row."""
        broker = self._broker
        rows = self._rows.get(clientid, {})
        if rows.pop(topic_filter, None) is None:
            return False
        if not rows:
            del self._rows[clientid]
        broker.log.change(DELETE, clientid, topic_filter)
        session = broker.sessions.get(clientid) if broker.router.local.lookup else None
        if session is not None:
            self._subscribing.unsubscribe(session, topic_filter)
        broker.when_durable(done)
        broker.turn_over()
        return True


def fault(clientid: str, topic_filter: str, qos: int) -> str:
    """Why this cannot be a subscription, empty if it can."""
    if not clientid or "\0" in clientid:
        return "a client id has at least one character, none of them U+0000"
    if any("\ud800" <= character <= "\udfff" for character in clientid + topic_filter):
        return "client id and topic filter are UTF-8 text"
    if len(clientid.encode()) > MAX_CLIENT_ID:
        return f"a client id is at most {MAX_CLIENT_ID} bytes long"
    if why := topic_filter_fault(topic_filter):
        return f"{topic_filter!r} is no topic filter: {why}"
    if qos not in (0, 1, 2):
        return f"the QoS is 0, 1 or 2, not {qos}"
    return ""
