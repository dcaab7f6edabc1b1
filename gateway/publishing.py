"""A PUBLISH, from a client or in its name: into the log if somebody needs it there, to its subscribers, and retained.

Invariant: what is to be acknowledged later is in the batch whose commit it waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidegate.store.entry import PUBLISH, RETAIN
from tidegate.store.few import NO_DICT
from tidegate.store.history import SET_CLEARED
from tidegate.store.log import Name
from tidegate.store.report import WARNING

from .aside import ADD_GUARD, SET_RETAINED
from .mqtt.reasons import ReasonCode
from .routing import ANY, Topic
from .session import Client, Session

if TYPE_CHECKING:
    from .broker import Broker

PUBACK, PUBREC = 0x40020000, 0x50020000


class Publishing:
    """See the module."""

    def __init__(self, broker: Broker, max_inflight: int) -> None:
        self._broker = broker
        self._max_inflight = max_inflight

    def on_publish(
        self, client: Client, session: Session, topic: Topic, flags: int, packet_id: int, payload: bytes, properties: bytes
    ) -> None:
        broker = self._broker
        broker.received += 1
        qos = flags >> 1 & 3
        if topic.reserved:
            broker.pressure.refuse_reserved(client, qos, packet_id)
        elif broker.router.refuses(topic, qos, bool(flags & 1)) and (qos < 2 or packet_id not in session.received):
            broker.pressure.refuse(client, topic, flags, packet_id, payload, properties)
        elif qos == 2:
            if packet_id not in session.received:
                if client.version == 5 and len(session.received) >= self._max_inflight:
                    broker.connecting.drop(client, ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)  # [MQTT-3.3.4-8]
                    return
                if broker.rows.stalls(session):
                    broker.pressure.refuse(client, topic, flags, packet_id, payload, properties)
                    return
                if session.received is NO_DICT:
                    session.received = {}
                session.received[packet_id] = None
                if session.persistent:
                    broker.log.change(ADD_GUARD, session.name, packet_id)
                    broker.rows.add_exchange()
                else:
                    broker.rows.passing += 1
                self.publish(session.name, topic, qos, bool(flags & 1), payload, properties)
            broker.acknowledge(client, PUBREC | packet_id)
        elif qos == 1:
            waits = self.publish(session.name, topic, qos, bool(flags & 1), payload, properties)
            ack = PUBACK | packet_id if topic.subscribed or client.version < 5 else no_subscribers(packet_id)
            if waits:
                broker.acknowledge(client, ack)
            else:
                broker.delivery.acknowledge_in_turn(client, ack)
        else:
            self.publish(session.name, topic, 0, bool(flags & 1), payload, properties)

    def publish(self, sender: Name, topic: Topic, qos: int, retain: bool, payload: bytes, properties: bytes) -> bool:
        """Take a message (4.3): into the log if somebody needs it there, to its subscribers; whether it waits for a commit."""
        broker = self._broker
        log = broker.log
        if topic.generation != broker.router.generation:
            broker.router.route(topic, PUBLISH)
        waits = False
        flags = qos | (RETAIN if retain else 0)
        seq = 0
        size = len(payload) + len(properties) if retain else 0
        kept = retain and payload and broker.retained.takes(topic.text, size)
        stored = topic.stored or self._follows_stored(topic) if qos else topic.stored_qos0
        if stored or (retain and (kept or topic.stored_retained)):
            seq = log.append(PUBLISH, sender, topic, flags if qos else flags | topic.kept_qos0, payload, properties)
            topic.waiting = seq if qos else topic.waiting
            waits = True
        if retain:
            if payload and not kept:
                self.refuse_retained(topic, size)
            waits |= self.set_retained(topic, seq, size if kept else 0)
        if not (qos and seq) and topic.targets:
            broker.delivery.fan_out(topic, 0, flags, payload, properties, sender, log.at, log.mono, log.run)
        return waits

    def _follows_stored(self, topic: Topic) -> bool:
        """Whether this message, which nobody needs in the log, would overtake one of its topic that waits (4.6)."""
        if not topic.waiting or not topic.targets:
            return False
        if topic.waiting == ANY:
            topic.waiting = self._broker.log.next_seq - 1
        return topic.waiting > self._broker.delivery.durable

    def refuse_retained(self, topic: Topic, size: int) -> None:
        """It goes to its subscribers and is not kept. Nor is the one before it: none is better than an old one."""
        self._broker.retained.refused += 1
        text = "max_retained_bytes is used up: a message was delivered and is not kept as the retained one of its topic"
        self._broker.report("retained_full", text, WARNING, topic=topic.text, size=size)

    def set_retained(self, topic: Topic, seq: int, size: int) -> bool:
        """This entry is the retained message of its topic now, none if `size` is 0; whether that waits for a commit."""
        if size:
            self._broker.retained.put(topic.text, seq, size)
            self._broker.log.change(SET_RETAINED, topic, seq)
            return True
        had = self._broker.retained.remove(topic.text)
        if had:
            self._broker.log.change("DELETE FROM retained WHERE topic = ?", topic)
        if asked := self._broker.router.local.asks_retained(topic.text):
            self._broker.log.change(SET_CLEARED, topic.text, self._broker.log.now)
        return had or asked


def no_subscribers(packet_id: int) -> bytes:
    """PUBACK of 5.0 for what is stored, maybe, and goes to no session (0x10, 3.4.2.1)."""
    return b"\x40\x03" + packet_id.to_bytes(2, "big") + b"\x10"
