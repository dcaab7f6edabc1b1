"""Out to the clients: packets are made, given their packet ids, joined and written once a turn.

QoS 0 is one packet for all its receivers; QoS 1 and 2 share what stands before and behind the packet id.

Invariant: a QoS 2 delivery of a session that survives leaves after the commit that holds its packet id [MQTT-4.4.0-1], and
nothing leaves before the CONNACK.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from tidegate.store.entry import DELIVERED
from tidegate.store.few import NO_DICT, NO_LIST
from tidegate.store.local import QUEUE, TOLD
from tidegate.store.log import ACK_BYTES, Ack, Log

from .mqtt.properties import Property, decode_block, encode_block
from .mqtt.wire import write_varint
from .queued import Queued
from .routing import Router, Topic
from .session import RELEASED, SENT, Client, Session
from .sessions import ADD_DELIVERY, SET_DELIVERY, delivery_state, forget_kept

TURN_BYTES = 256 << 10
"""What one client is given in one turn before its socket is asked whether it keeps up."""

PUBREL = 0x62020000
PACKET_ID = [number.to_bytes(2, "big") for number in range(65_536)]


class Outlet:
    """See the module. `sent`, `dropped` count messages."""

    def __init__(self, log: Log, router: Router, max_queued_bytes: int, queued: Queued, message_id: Any) -> None:
        self.sent = 0
        self.dropped: Counter[str] = Counter()
        self.dirty: list[Client] = []
        self._log = log
        self._router = router
        self._max_queued = max_queued_bytes
        self.queued = queued
        self.leaving: dict[Client, list[Ack]] = {}
        """Acknowledgements that wait for the batch that is being committed; those of the next one are in the log's batch."""
        self._message_id = message_id
        self.added_delivery: Callable[[], None] = lambda: None
        """A delivery of QoS 2 gets a row in the store."""

    def send(self, client: Client, data: bytes) -> None:
        """Add bytes to what the client gets at the end of this turn."""
        if client.out is NO_LIST:
            self.dirty.append(client)
            client.out = [data]
        else:
            client.out.append(data)
        client.out_size += len(data)

    def flush(self) -> None:
        """End of a turn: one write per client."""
        dirty, self.dirty = self.dirty, []
        for client in dirty:
            if client.held is not None:
                continue  # the CONNACK leaves first
            out, client.out, client.out_size = client.out, NO_LIST, 0
            if out and not client.closing:
                client.link.write(out[0] if len(out) == 1 else b"".join(out))

    def flush_one(self, client: Client) -> None:
        """Write what one client is still to get, because its connection ends now."""
        out, client.out, client.out_size = client.out, NO_LIST, 0
        if out and not client.closing and client.held is None:
            client.link.write(b"".join(out))

    def send_first(self, client: Client, connack: bytes) -> None:
        """The CONNACK, before what was sent since the session was attached."""
        client.out = [connack, *client.out]
        client.out_size += len(connack)
        self.dirty.append(client)

    def acknowledge(self, acks: dict[Client, list[Ack]]) -> None:
        """Add acknowledgement packets to what their clients get."""
        dirty = self.dirty
        for client, packets in acks.items():
            if len(packets) == 1:
                data = _bytes_of(packets[0])
            else:
                try:
                    data = struct.pack(f">{len(packets)}I", *packets)
                except struct.error:
                    data = b"".join(map(_bytes_of, packets))
            if client.out is NO_LIST:
                dirty.append(client)
                client.out = [data]
            else:
                client.out.append(data)
            client.out_size += len(data)

    def acknowledge_in_turn(self, client: Client, packet: Ack) -> None:
        """Acknowledge what waits for nothing: now, or behind those of this client that wait for a commit (4.6)."""
        for waiting in (self._log.batch.acks, self.leaving):
            if client in waiting:
                waiting[client].append(packet)
                self._log.batch.size += ACK_BYTES
                return
        self.acknowledge({client: [packet]})

    def send_value(self, client: Client, topic: Topic, payload: bytes) -> None:
        """A `$SYS` value for a new subscription: QoS 0, retain flag set."""
        head, tail = self._variant(topic, 32 | (client.version == 5), payload, b"")
        self._send_qos0(client, head + tail)

    def send_once(self, session: Session, client: Client, topic: Topic, payload: bytes) -> None:
        """A message with QoS 0 for this client alone."""
        if session.client is client:
            head, tail = self._variant(topic, int(client.version == 5), payload, b"")
            if not self._too_large(client, head, tail):
                self._send_qos0(client, head + tail)

    def _send_qos0(self, client: Client, packet: bytes) -> None:
        if (client.blocked or client.out_size > TURN_BYTES) and (
            client.out_size + client.link.buffered() + len(packet) > min(self._max_queued, self.queued.share)
        ):
            self.dropped["queue_full"] += 1
            return
        self.sent += 1
        self.send(client, packet)

    def _send_stored(
        self, session: Session, client: Client, seq: int, qos: int, parts: tuple[bytes, bytes], retain: bool = False
    ) -> None:
        if not qos:
            self._send_qos0(client, parts[0] + parts[1])
            return
        packet_id = session.free_packet_id()
        session.taken += 1
        if retain:
            if session.retaining is NO_DICT:
                session.retaining = {}
            session.retaining[packet_id] = seq
        if qos == 1:
            if session.inflight is NO_DICT:
                session.inflight = {}
            session.inflight[packet_id] = seq
            session.dirty = True
            self.send(client, parts[0] + PACKET_ID[packet_id] + parts[1])
            self.sent += 1
        else:
            self._send_qos2(session, client, seq, packet_id, parts)

    def _send_qos2(self, session: Session, client: Client, seq: int, packet_id: int, parts: tuple[bytes, bytes]) -> None:
        """QoS 2: the packet id of a session that survives must be on disk before the packet leaves [MQTT-4.4.0-1]."""
        if session.releasing is NO_DICT:
            session.releasing = {}
        session.releasing[packet_id] = (seq, SENT)
        session.dirty = True
        packet = parts[0] + PACKET_ID[packet_id] + parts[1]
        self.sent += 1
        if not session.persistent:
            self.send(client, packet)
            return
        self._log.change(ADD_DELIVERY, session.name, seq, packet_id, delivery_state(session, seq, packet_id, SENT))
        self.added_delivery()
        self._log.when_durable(self.send_if_connected, session, client, packet)

    def send_if_connected(self, session: Session, client: Client, packet: bytes) -> None:
        if session.client is client:
            self.send(client, packet)

    @staticmethod
    def _variant(topic: Topic, key: int, payload: bytes, properties: bytes) -> tuple[bytes, bytes]:
        """What stands before and behind the packet id; `key` = v5 | qos << 2 | retain << 5."""
        qos = key >> 2 & 3
        tail = (write_varint(len(properties)) + properties if key & 1 else b"") + payload
        length = len(topic.prefix) + len(tail) + (2 if qos else 0)
        first = 0x30 | qos << 1 | (1 if key & 32 else 0)
        return bytes((first,)) + write_varint(length) + topic.prefix, tail

    def _properties(self, properties: bytes, identifiers: bytes, at: int, mono: int, run: int) -> bytes:
        """The forwarded properties with the expiry counted down (3.3.2.3.3) and this client's identifiers added."""
        if b"\x02" in properties:
            found = decode_block(properties, 0, len(properties), "PUBLISH")
            if (left := _left(found, self._log.age(at, mono, run))) is not None:
                found[Property.MESSAGE_EXPIRY_INTERVAL] = left
            properties = encode_block(found)
        return properties + identifiers

    def _note(self, session: Session, topic: Topic, seq: int, qos: int, at: int, run: int, name: bytes = b"") -> None:
        """A message of a watched topic was sent; `name`: its id, where that is not the entry's own."""
        if seq and qos and topic.acks:
            self._follow(session, topic, seq, at, run, name)
        if seq and self._router.wanted(DELIVERED, topic.text):
            self._log.append(DELIVERED, session.name, topic, 0, name or self._message_id(seq, at, run))

    def _follow(self, session: Session, topic: Topic, seq: int, at: int, run: int, name: bytes = b"") -> None:
        """Its acknowledgement will say how far the client has read."""
        progress = session.followed()
        progress.sent[seq] = topic.raw
        if topic.acks & (TOLD | QUEUE):
            progress.names[seq] = name or self._message_id(seq, at, run)

    def _too_large(self, client: Client, head: bytes, tail: bytes) -> bool:
        """Whether the client does not take a packet of this size; counted (3.1.2.11.4)."""
        if client.maximum_packet_size and len(head) + len(tail) + 2 > client.maximum_packet_size:
            self.dropped["packet_too_large"] += 1
            return True
        return False

    def forget(self, session: Session, client: Client, packet_id: int, qos: int) -> None:
        """Give up a message that was sent and can never be sent again.

        With QoS 2 the client may have it and wait for its release: the packet id is free only when it was released.
        """
        session.dirty = True
        if session.progress is not None:
            seq = session.inflight.get(packet_id, 0) if qos == 1 else session.releasing[packet_id][0]
            session.progress.give_up(seq, fetched=qos == 1)
        if qos == 1:
            if session.inflight.pop(packet_id, None) is not None:
                session.drop("no_longer_stored")
            forget_kept(self._log, session, (packet_id,))
            return
        seq, _ = session.releasing[packet_id]
        session.releasing[packet_id] = (seq, RELEASED)
        if session.persistent:
            self._log.change(SET_DELIVERY, delivery_state(session, seq, packet_id, RELEASED), session.name, seq, packet_id)
        self._log.acknowledge(client, PUBREL | packet_id)

    def _expired(self, properties: bytes, at: int, mono: int, run: int) -> bool:
        found = decode_block(properties, 0, len(properties), "PUBLISH")
        return _over(found, self._log.age(at, mono, run))


def _bytes_of(packet: Ack) -> bytes:
    return packet if type(packet) is bytes else packet.to_bytes(4, "big")  # type: ignore[union-attr]


def _left(properties: dict[Any, Any], waited: int) -> int | None:
    """Seconds of message expiry left after `waited` ms, None when the message does not expire."""
    interval = properties.get(Property.MESSAGE_EXPIRY_INTERVAL)
    return None if interval is None else max(0, int(interval) - waited // 1000)


def _over(properties: dict[Any, Any], waited: int) -> bool:
    """Whether that has passed. 0 seconds are for who is there: they have a second like any other."""
    interval = properties.get(Property.MESSAGE_EXPIRY_INTERVAL)
    return interval is not None and waited >= 1000 * max(1, int(interval))
