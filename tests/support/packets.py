"""MQTT packets as a test client sees them: bytes from a server to packets, and the pieces to write its own.

Rules: nothing of the gateway's codec is used, so that one misunderstanding cannot hide in both. Every bit is
checked, and only what a server may send is accepted; anything else is an AssertionError that shows the
bytes.

Invariant: `Decoder.feed` returns each packet once, in order, whatever the pieces in which its bytes arrive.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

Properties = dict[int, Any]
"""Property number → value; of 38 (user property) a list of pairs, of 11 (subscription id) a list."""


class Kind(IntEnum):
    """Packet types (MQTT 2.1.2)."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet from the broker. `reason` of a 3.1.1 CONNACK is its return code."""

    kind: Kind
    packet_id: int = 0
    reason: int = 0
    reasons: tuple[int, ...] = ()
    topic: str = ""
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    dup: bool = False
    session_present: bool = False
    properties: Properties = field(default_factory=dict)


class Decoder:
    """Bytes from a server → packets. Raises AssertionError for anything the standard does not allow."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._data = b""

    def feed(self, data: bytes) -> list[Packet]:
        """All packets that are complete now."""
        self._data += data
        packets = []
        at = 0
        while (found := _frame_at(self._data, at)) is not None:
            start, end = found
            packets.append(self._decode(self._data[at], self._data[start:end]))
            at = end
        self._data = self._data[at:]
        return packets

    def _decode(self, first: int, body: bytes) -> Packet:
        kind, flags = Kind(first >> 4), first & 15
        reader = Reader(body)
        if kind is Kind.PUBLISH:
            return self._publish(flags, reader)
        assert flags == (2 if kind is Kind.PUBREL else 0), f"flags {flags} in {kind.name} {body.hex()}"
        packet = self._other(kind, reader)
        assert reader.left() == 0, f"bytes left over in {kind.name} {body.hex()}"
        return packet

    def _publish(self, flags: int, reader: Reader) -> Packet:
        qos, dup = flags >> 1 & 3, bool(flags & 8)
        assert qos < 3 and (qos or not dup), f"flags {flags} in PUBLISH"
        topic = reader.text()
        assert topic or self._version == 5, "empty topic"
        assert not set("+#\0") & set(topic), f"topic {topic!r} in PUBLISH"
        packet_id = reader.nonzero() if qos else 0
        properties = self._read_properties(reader)
        payload = reader.rest()
        return Packet(
            Kind.PUBLISH,
            packet_id,
            topic=topic,
            payload=payload,
            qos=qos,
            retain=bool(flags & 1),
            dup=dup,
            properties=properties,
        )

    def _other(self, kind: Kind, reader: Reader) -> Packet:
        five = self._version == 5
        if kind is Kind.CONNACK:
            flags, reason = reader.byte(), reader.byte()
            assert flags < 2 and not (flags and reason), f"CONNACK flags {flags}, reason {reason}"
            properties = self._read_properties(reader)
            return Packet(kind, reason=reason, session_present=bool(flags), properties=properties)
        if kind in (Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP):
            packet_id = reader.nonzero()
            reason = reader.byte() if five and reader.left() else 0
            properties = self._read_properties(reader) if reader.left() else {}
            return Packet(kind, packet_id, reason, properties=properties)
        if kind in (Kind.SUBACK, Kind.UNSUBACK):
            packet_id = reader.nonzero()
            properties = self._read_properties(reader)
            return Packet(kind, packet_id, reasons=tuple(reader.rest()), properties=properties)
        if kind is Kind.PINGRESP:
            return Packet(kind)
        assert five and kind in (Kind.DISCONNECT, Kind.AUTH), f"a server must not send {kind.name}"
        reason = reader.byte() if reader.left() else 0
        return Packet(kind, reason=reason, properties=self._read_properties(reader) if reader.left() else {})

    def _read_properties(self, reader: Reader) -> Properties:
        if self._version < 5:
            return {}
        inner = Reader(reader.take(reader.varint()))
        properties: Properties = {}
        while inner.left():
            number = inner.varint()
            assert number in PROPERTY_TYPES, f"unknown property {number}"
            value = inner.value(PROPERTY_TYPES[number])
            if number in REPEATABLE:
                properties.setdefault(number, []).append(value)
            else:
                assert number not in properties, f"property {number} twice"
                properties[number] = value
        return properties


class Reader:
    """Takes values off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        assert size <= self.left(), f"{self._data.hex()} ends too early"
        self._at += size
        return self._data[self._at - size : self._at]

    def rest(self) -> bytes:
        return self.take(self.left())

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def nonzero(self) -> int:
        packet_id = self.number(2)
        assert packet_id, "packet id 0"
        return packet_id

    def text(self) -> str:
        return self.take(self.number(2)).decode()

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                assert byte or shift == 7, "variable byte integer is longer than needed"
                return value
            assert shift < 28, "variable byte integer of more than four bytes"

    def value(self, kind: str) -> Any:
        """A property's value: 1, 2, 4 bytes, v(arint), s(tring), b(ytes), p(air of strings)."""
        if kind == "p":
            return (self.text(), self.text())
        if kind == "s":
            return self.text()
        if kind == "b":
            return self.take(self.number(2))
        return self.varint() if kind == "v" else self.number(int(kind))


_BY_TYPE = {
    "1": (1, 23, 25, 36, 37, 40, 41, 42),
    "2": (19, 33, 34, 35),
    "4": (2, 17, 24, 39),
    "v": (11,),
    "s": (3, 8, 18, 21, 26, 28, 31),
    "b": (9, 22),
    "p": (38,),
}
PROPERTY_TYPES = {number: kind for kind, numbers in _BY_TYPE.items() for number in numbers}
"""MQTT 5.0, table 2-4."""
REPEATABLE = {11, 38}


def encode_properties(properties: Properties) -> bytes:
    """Properties with their length."""
    body = b""
    for number, value in properties.items():
        for one in value if number in REPEATABLE else (value,):
            body += varint(number) + _encode_value(PROPERTY_TYPES[number], one)
    return varint(len(body)) + body


def _encode_value(kind: str, value: Any) -> bytes:
    if kind == "p":
        return text(value[0]) + text(value[1])
    if kind == "s":
        return text(value)
    if kind == "b":
        return binary(value)
    return varint(value) if kind == "v" else int(value).to_bytes(int(kind), "big")


def frame(first: int, body: bytes) -> bytes:
    """A packet from its first byte and what follows the remaining length."""
    return bytes((first,)) + varint(len(body)) + body


def text(value: str) -> bytes:
    """A UTF-8 string with its length."""
    return binary(value.encode())


def binary(value: bytes) -> bytes:
    """Bytes with their length."""
    return struct.pack(">H", len(value)) + value


def varint(value: int) -> bytes:
    """A variable byte integer."""
    encoded = bytearray()
    while True:
        value, digit = divmod(value, 128)
        encoded.append(digit | (128 if value else 0))
        if not value:
            return bytes(encoded)


def _frame_at(data: bytes, at: int) -> tuple[int, int] | None:
    """(start, end) of the body of the packet at `at`, None while it is not complete."""
    length = shift = 0
    for start in range(at + 1, min(at + 5, len(data))):
        length |= (data[start] & 127) << shift
        shift += 7
        if data[start] < 128:
            assert data[start] or shift == 7, "remaining length is longer than needed"
            end = start + 1 + length
            return (start + 1, end) if end <= len(data) else None
    assert len(data) < at + 5, f"remaining length of more than four bytes: {data[at : at + 5].hex()}"
    return None
