"""What far ends know for devices takes effect here: the broker's side of the inbox (`store.inbox`).

The uplink tells that there are answers; they are read by the reader's thread, a piece at a time, and applied in the event loop
like anything else that happens: rows and changes in the log's batch, with the place in the inbox in the same commit. The next
piece is read when that is durable, so the reader sees all that was applied.

Invariant: an answer has its effect once, whatever is killed, and nothing here keeps a client waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidegate.store.answers import Answers, Local, next_answers
from tidegate.store.entry import FOREIGN, KEPT_THERE, RETAIN
from tidegate.store.foreign import Known, event_time, pack
from tidegate.store.history import FORGET_ACKED, FORGET_CLEARED, SET_POSITION
from tidegate.store.inbox import MESSAGE, POSITION, RETAINED, SUBSCRIBE, SUBSCRIPTIONS, UNSUBSCRIBE, Answer
from tidegate.store.log import Name
from tidegate.store.msgid import origin
from tidegate.store.report import WARNING
from tidegate.store.topic import matches

from .broker import Broker
from .mqtt.errors import MqttError
from .routing import Topic, target_of
from .session import Session, Subscription

KEEP = "INSERT OR REPLACE INTO cursor (name, seq) VALUES (?,?)"
FORGET_OTHERS = "DELETE FROM cursor WHERE name LIKE 'inbox:%' AND name <> ?"
"""There is one inbox at a time."""
RETRY = 5.0
SWEEP_PAUSE = 3600.0
ACKED_FOR, CLEARED_FOR = 7 * 86_400_000, 30 * 86_400_000
"""ms for which it is remembered that a client has acknowledged a message; that a retained message was deleted here."""


class Inbox:
    """`look()` whenever there may be answers; `path` is the uplink's file."""

    def __init__(self, broker: Broker, path: Path) -> None:
        self._broker = broker
        self._path = path
        self._looking = self._again = False
        self._retry_at: float | None = None
        self._next_sweep = 0.0
        self._seen: set[tuple[str, str]] = set()
        """(client, msgid) of the messages of this piece."""
        self._apply = {
            SUBSCRIPTIONS: self._compare,
            SUBSCRIBE: self._subscribe,
            UNSUBSCRIBE: self._unsubscribe,
            MESSAGE: self._message,
            RETAINED: self._retained,
            POSITION: self._position,
        }

    def look(self) -> None:
        """There may be something new."""
        self._again = self._looking
        if not self._looking:
            self._looking = True
            self._broker.read(lambda reader: next_answers(self._path, reader.db), self._have)

    def tick(self) -> None:
        """Once a second: look again where it could not be read; forget what is long over."""
        broker = self._broker
        if self._retry_at is not None and broker.now >= self._retry_at:
            self.look()
        if broker.now >= self._next_sweep and self._path.exists():
            self._next_sweep = broker.now + SWEEP_PAUSE
            broker.log.change(FORGET_ACKED, broker.log.now - ACKED_FOR)
            broker.log.change(FORGET_CLEARED, broker.log.now - CLEARED_FOR)

    def _have(self, found: Answers | Exception | None) -> None:
        self._looking, self._retry_at = False, None
        if isinstance(found, Exception):
            self._retry_at = self._broker.now + RETRY
            text = "answers of far ends cannot be read; they are kept and read later"
            self._broker.report("inbox_unreadable", text, WARNING, reason=found)
        elif found is not None:
            self._take(found)
        elif self._again:
            self.look()

    def _take(self, found: Answers) -> None:
        """All of them in one commit, with the place behind them."""
        self._looking = True
        broker = self._broker
        self._seen.clear()
        for answer, local in found.answers:
            apply = self._apply.get(answer.kind, self._refuse)
            try:
                apply(answer, local)
            except (MqttError, ValueError, TypeError):  # others wrote it: whatever it is, the next one is applied
                self._refuse(answer, local)
        broker.log.change(FORGET_OTHERS, found.cursor)
        broker.log.change(KEEP, found.cursor, found.answers[-1][0].id)
        broker.when_durable(self._taken)
        broker.turn_over()

    def _taken(self) -> None:
        self._looking = False
        self.look()

    def _refuse(self, answer: Answer, _: Local) -> None:
        self._broker.counters["answers_refused"] += 1
        text = "what a far end has for a client means nothing here; it is passed over"
        fields = {"pool": answer.pool, "client": answer.client, "topic": answer.topic or answer.filters, "msgid": answer.msgid}
        self._broker.report("answer_refused", text, WARNING, f"answer {answer.pool}", **fields)

    # -- subscriptions ---------------------------------------------------------------------------------------------

    def _compare(self, answer: Answer, _: Local) -> None:
        self._broker.made.compare(answer.pool, answer.client, dict(_filters(answer)))

    def _subscribe(self, answer: Answer, _: Local) -> None:
        for topic_filter, qos in _filters(answer):
            self._broker.made.bring(answer.pool, answer.client, topic_filter, qos)

    def _unsubscribe(self, answer: Answer, _: Local) -> None:
        for topic_filter, _qos in _filters(answer):
            self._broker.made.take_away(answer.pool, answer.client, topic_filter)

    # -- messages --------------------------------------------------------------------------------------------------

    def _message(self, answer: Answer, local: Local) -> None:
        """A stored message goes to the session that asked, if it has it in no other way."""
        found = self._asking(answer)
        if found is None:
            return
        session, subscription, topic = found
        if local.given or (answer.client, answer.msgid) in self._seen:
            return
        if local.waits and not self._broker.offline.addressed.withdraw_stranded(session, topic, local.waits):
            return
        if local.ours and self._has_from_here(session, answer):
            return
        if subscription.no_local and answer.sender == answer.client:
            return
        self._seen.add((answer.client, answer.msgid))
        qos = min(answer.qos, subscription.qos)
        if qos:
            self._address(session, topic, answer)
        elif session.client is not None:
            self._broker.when_durable(self._broker.delivery.send_once, session, session.client, topic, answer.payload)

    def _asking(self, answer: Answer) -> tuple[Session, Subscription, Topic] | None:
        """The session and its subscription for which this was found, if they are still there. Raises MqttError, ValueError."""
        topic = self._broker.router.topics[answer.topic.encode()]
        if topic.reserved or not matches(answer.filter, topic.text) or answer.qos not in (0, 1, 2):
            raise ValueError(answer.topic)
        session = self._broker.sessions.get(answer.client)
        subscription = session.subscriptions.get(answer.filter) if session is not None else None
        if session is None or subscription is None:
            self._broker.counters["answers_too_late"] += 1
            return None
        return session, subscription, topic

    def _has_from_here(self, session: Session, answer: Answer) -> bool:
        """Whether a message that this log has comes to the session from there: by a fetching rule, or as published."""
        rules = self._broker.router.local
        if rules.fetch_for(answer.filter) is not None and rules.age_of(answer.topic):
            return True
        seq = _seq_of(answer.msgid)
        return any(s.qos and s.since < seq for text, s in session.subscriptions.items() if matches(text, answer.topic))

    def _address(self, session: Session, topic: Topic, answer: Answer) -> None:
        known = Known(answer.msgid, answer.sender, event_time(answer.msgid, answer.at))
        flags = answer.qos | FOREIGN
        self._broker.offline.addressed.add(session, topic, answer.msgid, flags, answer.payload, pack(known))

    # -- retained messages -----------------------------------------------------------------------------------------

    def _retained(self, answer: Answer, local: Local) -> None:
        """The newer of the far end's and ours is the retained message here; the session that asked gets it if it is theirs."""
        found = self._asking(answer)
        broker, at = self._broker, event_time(answer.msgid, answer.at)
        if found is None or not answer.payload or local.ours or at <= local.at:
            return
        session, subscription, topic = found
        if next(broker.retained.find(topic.text), 0) != local.retained:
            return  # another one came meanwhile, and is newer
        known = pack(Known(answer.msgid, answer.sender, at))
        if not broker.retained.takes(topic.text, size := len(answer.payload) + len(known)):
            broker.publishing.refuse_retained(topic, size)
            return
        flags = answer.qos | RETAIN | FOREIGN
        seq = broker.log.append(KEPT_THERE, Name(answer.sender), topic, flags, answer.payload, known)
        broker.publishing.set_retained(topic, seq, size)
        broker.when_durable(self._send_retained, session, answer.filter, subscription, seq)

    def _send_retained(self, session: Session, topic_filter: str, subscription: Subscription, seq: int) -> None:
        if session.client is not None and session.subscriptions.get(topic_filter) is subscription:
            target = target_of(session, subscription)
            self._broker.delivery.add_retained(session.client, topic_filter, target, seq)

    # -- positions -------------------------------------------------------------------------------------------------

    def _position(self, answer: Answer, local: Local) -> None:
        """How far the client has read messages of this log, elsewhere too."""
        if local.ours:
            broker = self._broker
            session = broker.sessions.get(answer.client)
            name = session.name if session is not None else Name(answer.client)
            topic = broker.router.topics[answer.topic.encode()]
            broker.log.change(SET_POSITION, name, topic, answer.seq, broker.log.now)


def _seq_of(msgid: str) -> int:
    found = origin(msgid)
    return found.seq if found is not None else 0


def _filters(answer: Answer) -> list[tuple[str, int]]:
    found: list[Any] = json.loads(answer.filters)
    return [(str(topic_filter), int(qos)) for topic_filter, qos in found]
