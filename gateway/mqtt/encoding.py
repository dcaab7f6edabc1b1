"""Packets into bytes.

One function per packet type gives the flags of the first byte and the body; `encode` adds the fixed header. What the
version cannot say is left out (properties, reasons before 5.0). A value that does not fit its field, a packet id of 0, a QoS
of 3 and the like are our own mistakes: `ValueError`. Topics, filters and property tables are not looked at again; who
builds a packet has them from a checked source.

Invariant: the lengths on the wire are right whatever the packet holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .packet_types import (
    Auth,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    Will,
)
from .properties import Properties, encode_properties
from .reasons import connect_return_code
from .wire import MAX_UINT16, write_binary, write_text, write_uint, write_varint


def encode(packet: Packet, version: int) -> bytes:
    """The bytes of `packet` for a peer that speaks protocol level `version` (a CONNECT names its own)."""
    kind, write = _WRITERS[type(packet)]
    flags, body = write(packet, version)
    return bytes((kind << 4 | flags,)) + write_varint(len(body)) + body


def _properties(properties: Properties, version: int) -> bytes:
    return encode_properties(properties) if version == 5 else b""


def _packet_id(packet_id: int) -> bytes:
    if not 1 <= packet_id <= MAX_UINT16:
        raise ValueError(f"packet id {packet_id} is not in 1 to {MAX_UINT16}")
    return packet_id.to_bytes(2, "big")


def _qos(qos: int) -> int:
    if not 0 <= qos <= 2:
        raise ValueError(f"QoS {qos} is not in 0 to 2")
    return qos


def _connect(packet: Connect, version: int) -> tuple[int, bytes]:
    version = packet.version
    will = packet.will
    if version not in (3, 4, 5):
        raise ValueError(f"protocol level {version} is not 3, 4 or 5")
    if packet.password is not None and packet.username is None and version < 5:
        raise ValueError("a password without a user name needs MQTT 5.0")  # [MQTT-3.1.2-22] of 3.1.1
    flags = packet.clean_start << 1
    flags |= (packet.password is not None) << 6 | (packet.username is not None) << 7
    if will is not None:
        flags |= 4 | _qos(will.qos) << 3 | will.retain << 5
    name = b"\x00\x06MQIsdp" if version == 3 else b"\x00\x04MQTT"
    body = name + bytes((version, flags)) + write_uint(packet.keep_alive, 2)
    body += _properties(packet.properties, version) + write_text(packet.client_id)
    if will is not None:
        body += _will(will, version)
    if packet.username is not None:
        body += write_text(packet.username)
    if packet.password is not None:
        body += write_binary(packet.password)
    return 0, body


def _will(will: Will, version: int) -> bytes:
    return _properties(will.properties, version) + write_text(will.topic) + write_binary(will.payload)


def _connack(packet: ConnAck, version: int) -> tuple[int, bytes]:
    if version == 5:
        return 0, bytes((packet.session_present, packet.reason)) + encode_properties(packet.properties)
    return 0, bytes((packet.session_present, connect_return_code(packet.reason)))


def _publish(packet: Publish, version: int) -> tuple[int, bytes]:
    if not packet.qos and (packet.packet_id or packet.dup):
        raise ValueError("QoS 0 has neither packet id nor DUP")
    flags = packet.dup << 3 | _qos(packet.qos) << 1 | packet.retain
    packet_id = _packet_id(packet.packet_id) if packet.qos else b""
    return flags, b"".join((write_text(packet.topic), packet_id, _properties(packet.properties, version), packet.payload))


def _ack(packet: PubAck | PubRec | PubRel | PubComp, version: int) -> tuple[int, bytes]:
    flags = 2 if isinstance(packet, PubRel) else 0
    return flags, _packet_id(packet.packet_id) + _reason_and_properties(packet.reason, packet.properties, version)


def _reason_and_properties(reason: int, properties: Properties, version: int) -> bytes:
    """What 3.4.2.1 and its like allow to leave out is left out."""
    if version < 5 or (not reason and not properties):
        return b""
    return bytes((reason,)) + (encode_properties(properties) if properties else b"")


def _subscribe(packet: Subscribe, version: int) -> tuple[int, bytes]:
    if not packet.subscriptions:
        raise ValueError("a SUBSCRIBE names at least one topic filter")  # [MQTT-3.8.3-2]
    body = bytearray(_packet_id(packet.packet_id) + _properties(packet.properties, version))
    for wanted in packet.subscriptions:
        options = _qos(wanted.qos)
        if version == 5:
            options |= wanted.no_local << 2 | wanted.retain_as_published << 3 | wanted.retain_handling << 4
        body += write_text(wanted.filter)
        body.append(options)
    return 2, bytes(body)


def _suback(packet: SubAck, version: int) -> tuple[int, bytes]:
    if version < 5:  # one failure code only, 3.9.3 of 3.1.1
        return 0, _packet_id(packet.packet_id) + bytes(min(reason, 0x80) for reason in packet.reasons)
    return 0, _packet_id(packet.packet_id) + encode_properties(packet.properties) + bytes(packet.reasons)


def _unsubscribe(packet: Unsubscribe, version: int) -> tuple[int, bytes]:
    if not packet.filters:
        raise ValueError("an UNSUBSCRIBE names at least one topic filter")  # [MQTT-3.10.3-2]
    head = _packet_id(packet.packet_id) + _properties(packet.properties, version)
    return 2, head + b"".join(map(write_text, packet.filters))


def _unsuback(packet: UnsubAck, version: int) -> tuple[int, bytes]:
    if version < 5:
        return 0, _packet_id(packet.packet_id)
    return 0, _packet_id(packet.packet_id) + encode_properties(packet.properties) + bytes(packet.reasons)


def _ping(packet: PingReq | PingResp, version: int) -> tuple[int, bytes]:
    return 0, b""


def _disconnect(packet: Disconnect | Auth, version: int) -> tuple[int, bytes]:
    if version < 5 and isinstance(packet, Auth):
        raise ValueError("AUTH needs MQTT 5.0")
    body = _reason_and_properties(packet.reason, packet.properties, version)
    return 0, body


_WRITERS: dict[type, tuple[int, Callable[[Any, int], tuple[int, bytes]]]] = {
    Connect: (1, _connect),
    ConnAck: (2, _connack),
    Publish: (3, _publish),
    PubAck: (4, _ack),
    PubRec: (5, _ack),
    PubRel: (6, _ack),
    PubComp: (7, _ack),
    Subscribe: (8, _subscribe),
    SubAck: (9, _suback),
    Unsubscribe: (10, _unsubscribe),
    UnsubAck: (11, _unsuback),
    PingReq: (12, _ping),
    PingResp: (13, _ping),
    Disconnect: (14, _disconnect),
    Auth: (15, _disconnect),
}
