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
    "INSERT INTO proxy_subscription (clientid, topic, qos, created, source) VALUES (?,?,?,?,?)"
    " ON CONFLICT (clientid, topic, source) DO UPDATE SET qos = excluded.qos"
)
DELETE = "DELETE FROM proxy_subscription WHERE clientid = ? AND topic = ? AND source = ?"
HERE = ""
"""Source of a row that an operator made with `tidegate sub`; else it is the pool whose far end has it."""
MAX_CLIENT_ID = 65_535
Rows = dict[str, dict[str, int]]
"""Of one client: filter -> source -> QoS."""


class MadeSubscriptions:
    """See the module."""

    def __init__(self, broker: Broker, subscribing: Subscribing) -> None:
        self._broker = broker
        self._subscribing = subscribing
        self._rows: dict[str, Rows] = {}

    def load(self, db: sqlite3.Connection) -> None:
        for clientid, text, qos, source in db.execute(
            "SELECT clientid, topic, qos, source FROM proxy_subscription ORDER BY id"
        ):
            self._rows.setdefault(clientid, {}).setdefault(text, {})[source] = qos

    def look_up(self, session: Session, new: bool) -> list[Made]:
        """At a connect: make the subscriptions that the session has not got; what they bring is sent after the CONNACK."""
        rows, rules = self._rows.get(session.name.text), self._broker.router.local
        if rows is None:
            return []
        found = {
            text: max(qos for source, qos in sources.items() if rules.looks_up(source, new))
            for text, sources in rows.items()
            if text not in session.subscriptions and any(rules.looks_up(source, new) for source in sources)
        }
        return [made for text, qos in found.items() if (made := self._make(session, text, qos)) is not None]

    def _make(self, session: Session, topic_filter: str, qos: int) -> Made | None:
        if fault(session.name.text, topic_filter, qos):
            self._refuse(session.name.text, topic_filter, "not_a_subscription")
            return None
        made = self._subscribing.subscribe(session, Requested(topic_filter, qos, False, False, 0))
        if isinstance(made, Made):
            return made
        self._refuse(session.name.text, topic_filter, made.name.lower())
        return None

    def _refuse(self, clientid: str, topic_filter: str, reason: str) -> None:
        self._broker.counters["lookup_refused"] += 1
        text, about = "a client may not have a subscription that was made for it", f"lookup {clientid}"
        self._broker.report("lookup_refused", text, WARNING, about, client=clientid, filter=topic_filter, reason=reason)

    def add(self, clientid: str, topic_filter: str, qos: int, done: Callable[[], None]) -> bool:
        """Add a row, or give it another QoS. A session that is there has the subscription at once; False if it may not."""
        self._keep(clientid, topic_filter, qos, HERE)
        session = self._broker.sessions.get(clientid) if self._broker.router.local.lookup else None
        works = session is None or self._make_now(session, topic_filter, qos)
        self._broker.when_durable(done)
        self._broker.turn_over()
        return works

    def remove(self, clientid: str, topic_filter: str, done: Callable[[], None]) -> bool:
        """Take a row away, and the subscription from a session that is there; whether there was a row."""
        if not self._forget(clientid, topic_filter, HERE):
            return False
        if self._broker.router.local.lookup:
            self._unmake_now(clientid, topic_filter)
        self._broker.when_durable(done)
        self._broker.turn_over()
        return True

    # -- what a far end has ----------------------------------------------------------------------------------------

    def compare(self, source: str, clientid: str, wanted: dict[str, int]) -> None:
        """All rows of the client that stand there now: what is new is made, what is gone is taken away."""
        rows = self._rows.get(clientid, {})
        before = {text: sources[source] for text, sources in rows.items() if source in sources}
        for text in before.keys() - wanted.keys():
            self.take_away(source, clientid, text)
        session = self._broker.sessions.get(clientid)
        for text, qos in wanted.items():
            known = before.get(text)
            if known == qos or not self._keep_if_sound(clientid, text, qos, source):
                continue
            # A client that has it already, by itself or since before a restart, gets no second replay.
            if session is not None and (known is not None or text not in session.subscriptions):
                self._make_now(session, text, qos)

    def bring(self, source: str, clientid: str, topic_filter: str, qos: int) -> None:
        """One row more, or one with another QoS."""
        if self._keep_if_sound(clientid, topic_filter, qos, source):
            session = self._broker.sessions.get(clientid)
            if session is not None:
                self._make_now(session, topic_filter, qos)

    def take_away(self, source: str, clientid: str, topic_filter: str) -> None:
        """A row that is gone there. The subscription stays if another row stands for it."""
        if self._forget(clientid, topic_filter, source):
            self._unmake_now(clientid, topic_filter)

    def _keep_if_sound(self, clientid: str, topic_filter: str, qos: int, source: str) -> bool:
        if fault(clientid, topic_filter, qos):
            self._refuse(clientid, topic_filter, "not_a_subscription")
            return False
        self._keep(clientid, topic_filter, qos, source)
        return True

    # -- rows and sessions -----------------------------------------------------------------------------------------

    def _keep(self, clientid: str, topic_filter: str, qos: int, source: str) -> None:
        self._rows.setdefault(clientid, {}).setdefault(topic_filter, {})[source] = qos
        self._broker.log.change(ADD, clientid, topic_filter, qos, self._broker.log.now, source)

    def _forget(self, clientid: str, topic_filter: str, source: str) -> bool:
        """Whether there was such a row."""
        rows = self._rows.get(clientid, {})
        sources = rows.get(topic_filter, {})
        if sources.pop(source, None) is None:
            return False
        if not sources:
            del rows[topic_filter]
        if not rows:
            del self._rows[clientid]
        self._broker.log.change(DELETE, clientid, topic_filter, source)
        return True

    def _make_now(self, session: Session, topic_filter: str, qos: int) -> bool:
        made = self._make(session, topic_filter, qos)
        if made is not None:
            self._subscribing.bring(session, [made])
        return made is not None

    def _unmake_now(self, clientid: str, topic_filter: str) -> None:
        session = self._broker.sessions.get(clientid)
        if session is not None and topic_filter not in self._rows.get(clientid, {}):
            self._subscribing.unsubscribe(session, topic_filter)


def fault_of_new(clientid: str, topic_filter: str, qos: int) -> str:
    """Why it cannot be made now: what an earlier version kept can still be taken away."""
    if topic_filter.startswith("$share/"):
        text = "shared subscriptions come with a later version; without $share/NAME/ it is one of the client alone"
        return f"{topic_filter!r}: {text}"
    return fault(clientid, topic_filter, qos)


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
