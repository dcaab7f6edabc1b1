"""The second half of every exchange: what clients say about messages they got, and PUBREL for those they sent (4.3).

Whatever frees a packet id or promises that a message will not come again waits for the commit that holds it. An answer that
only repeats another waits as well: what it repeats may not be durable yet.

Invariant: of a session that survives, no PUBREL and no PUBCOMP leaves before the state that it stands for is on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.store.entry import ACKED
from tidegate.store.foreign import name_of
from tidegate.store.log import Name
from tidegate.store.report import ERROR

from .mqtt.connection import Acks
from .mqtt.packets import PubAck, PubComp, PubRec, PubRel, encode
from .mqtt.reasons import ReasonCode
from .outlet import PUBREL
from .routing import Topic
from .session import COMPLETE, RELEASED, SENT, Client, Session
from .sessions import forget_kept

if TYPE_CHECKING:
    from .broker import Broker

PUBCOMP = 0x70020000


class Exchanges:
    """Handlers of PUBACK, PUBREC, PUBREL and PUBCOMP."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def on_acks(self, client: Client, session: Session, acks: Acks) -> None:
        pop = session.inflight.pop
        if session.releasing and not session.releasing.keys().isdisjoint(acks.packet_ids):
            self._broker.connecting.drop(client, ReasonCode.PROTOCOL_ERROR)  # 4.3.3: a PUBACK for QoS 2
            return
        sent = len(session.inflight)
        progress = session.progress
        if progress is not None or self._broker.router.wanted(ACKED):
            for packet_id in acks.packet_ids:
                seq = pop(packet_id, 0)
                self._log_acked(session, seq)
                if progress is not None:
                    self._broker.offline.acked_qos1(session, progress, seq)
        else:
            for packet_id in acks.packet_ids:
                pop(packet_id, None)
        session.delivered += sent - len(session.inflight)
        if session.kept:
            forget_kept(self._broker.log, session, acks.packet_ids)
        session.dirty = True
        self._pump(session)

    def on_puback(self, client: Client, session: Session, packet: PubAck) -> None:
        self.on_acks(client, session, Acks((packet.packet_id,)))

    def on_pubrec(self, client: Client, session: Session, packet: PubRec) -> None:
        seq, state = session.releasing.get(packet.packet_id, (0, 0))
        if packet.packet_id in session.inflight:
            self._broker.connecting.drop(client, ReasonCode.PROTOCOL_ERROR)  # 4.3.2: a PUBREC for QoS 1
            return
        if not state and packet.reason >= 0x80:
            return
        if not state:
            answer = encode(PubRel(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND), 5)
            self._broker.delivery.acknowledge_in_turn(client, answer if client.version == 5 else PUBREL | packet.packet_id)
            return
        if state == SENT:
            self._log_acked(session, seq)
            if session.progress is not None:
                self._broker.offline.acked_qos2(session, session.progress, seq)
        if packet.reason >= 0x80:
            self._complete(session, packet.packet_id, seq)
            return
        session.releasing[packet.packet_id] = (seq, RELEASED)
        if state == SENT:
            self._broker.sessions.set_delivery(session, seq, packet.packet_id, RELEASED)
        self._acknowledge(client, session, PUBREL | packet.packet_id)

    def on_pubrel(self, client: Client, session: Session, packet: PubRel) -> None:
        """The guard must be gone from the disk before PUBCOMP frees the packet id for another message."""
        if packet.packet_id in session.received:
            del session.received[packet.packet_id]
            if session.persistent:
                self._broker.log.change(
                    "DELETE FROM received WHERE client = ? AND packet_id = ?", session.name, packet.packet_id
                )
            else:
                self._broker.rows.passing -= 1
        elif client.version == 5:
            answer = encode(PubComp(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND), 5)
            self._broker.when_durable(self._broker.delivery.send_if_connected, session, client, answer)
            return
        self._acknowledge(client, session, PUBCOMP | packet.packet_id)

    def on_pubcomp(self, client: Client, session: Session, packet: PubComp) -> None:
        seq, state = session.releasing.get(packet.packet_id, (0, 0))
        if packet.packet_id in session.inflight or state == SENT:
            self._broker.connecting.drop(client, ReasonCode.PROTOCOL_ERROR)  # [MQTT-4.3.3-3]: unacknowledged until the PUBREC
            return
        if seq:
            self._complete(session, packet.packet_id, seq)
        else:
            self._pump(session)

    def _complete(self, session: Session, packet_id: int, seq: int) -> None:
        del session.releasing[packet_id]
        session.delivered += 1
        self._broker.sessions.set_delivery(session, seq, packet_id, COMPLETE)
        if session.progress is not None:
            self._broker.offline.completed(session, session.progress, seq)
        session.dirty = True
        self._pump(session)

    def _pump(self, session: Session) -> None:
        if session.behind or session.retained or session.retained_due:
            self._broker.delivery.pump(session)

    def _log_acked(self, session: Session, seq: int) -> None:
        if not seq or not self._broker.router.wanted(ACKED):
            return
        progress = session.progress
        if progress is not None and seq in progress.sent and seq in progress.names:
            # In the commit of what the acknowledgement does here: a crash must not part what far ends are told from it.
            self._append_acked(session, self._broker.router.topics[progress.sent[seq]], progress.names[seq])
            return
        row = self._broker.delivery.in_memory(seq)
        if row is not None:
            self._append_acked(session, row[6], name_of(row[7], row[9]) or self._broker.message_id(seq, row[1], row[3]))
        else:
            self._broker.read(lambda reader: reader.fetch([seq]), lambda got: self._late_acked(session, got))

    def _late_acked(self, session: Session, got: Any) -> None:
        if isinstance(got, BaseException):
            text = "the log cannot be read for an acknowledgement; no message.acked is written"
            self._broker.report("acked_lost", text, ERROR, client=session.name.text, reason=got)
            return
        for message in got.messages:
            topic = self._broker.router.topics[message[1]]
            name = name_of(message[2], message[4]) or self._broker.message_id(message[0], message[6], message[8])
            self._append_acked(session, topic, name)
        self._broker.turn_over()

    def _append_acked(self, session: Session, topic: Topic, message_id: bytes) -> None:
        if self._broker.router.wanted(ACKED, topic.text):
            name = session.name if self._broker.sessions.get(session.name.text) is session else Name(session.name.text)
            self._broker.log.append(ACKED, name, self._broker.router.topics[topic.raw], 0, message_id)

    def _acknowledge(self, client: Client, session: Session, packet: int) -> None:
        """Only who survives, a session or a position, has to remember, and so to wait."""
        if session.persistent or session.progress is not None:
            self._broker.acknowledge(client, packet)
        else:
            self._broker.delivery.acknowledge_in_turn(client, packet)
