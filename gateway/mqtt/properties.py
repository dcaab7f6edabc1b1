"""Properties of MQTT 5.0 (2.2.2), from one table: identifier, type, packets, legal values.

A set of properties is a dict from `Property` to its value: int, str or bytes; USER_PROPERTY a list of (name, value)
pairs, SUBSCRIPTION_IDENTIFIER a list of numbers. Only these two may repeat (the latter only in PUBLISH). The will's
properties count as those of a packet "WILL".

Invariant: what `decode_properties` returns, `encode_properties` writes back with the same meaning, user properties in order.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from tidegate.store.topic import topic_name_fault

from .errors import MqttError, ProtocolError, malformed, protocol_error
from .reasons import ReasonCode
from .wire import (
    read_binary,
    read_byte,
    read_text,
    read_uint16,
    read_uint32,
    read_varint,
    write_binary,
    write_text,
    write_uint,
    write_varint,
)


class Property(IntEnum):
    """Property identifiers (2.2.2.2)."""

    PAYLOAD_FORMAT_INDICATOR = 0x01
    MESSAGE_EXPIRY_INTERVAL = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_IDENTIFIER = 0x0B
    SESSION_EXPIRY_INTERVAL = 0x11
    ASSIGNED_CLIENT_IDENTIFIER = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTHENTICATION_METHOD = 0x15
    AUTHENTICATION_DATA = 0x16
    REQUEST_PROBLEM_INFORMATION = 0x17
    WILL_DELAY_INTERVAL = 0x18
    REQUEST_RESPONSE_INFORMATION = 0x19
    RESPONSE_INFORMATION = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_SUBSCRIPTION_AVAILABLE = 0x28
    SUBSCRIPTION_IDENTIFIER_AVAILABLE = 0x29
    SHARED_SUBSCRIPTION_AVAILABLE = 0x2A


Properties = dict[Property, Any]
"""See the module for the type of each value."""


class _Kind(NamedTuple):
    """A data type on the wire."""

    read: Callable[[bytes, int, int], tuple[Any, int]]
    write: Callable[[Any], bytes]


class _Row(NamedTuple):
    """What the standard says of one property."""

    kind: _Kind
    packets: frozenset[str]
    fault: Callable[[Any], str | None]


def _read_pair(data: bytes, pos: int, end: int) -> tuple[tuple[str, str], int]:
    name, pos = read_text(data, pos, end)
    value, pos = read_text(data, pos, end)
    return (name, value), pos


_BYTE = _Kind(read_byte, lambda value: write_uint(value, 1))
_UINT16 = _Kind(read_uint16, lambda value: write_uint(value, 2))
_UINT32 = _Kind(read_uint32, lambda value: write_uint(value, 4))
_VARINT = _Kind(read_varint, write_varint)
_TEXT = _Kind(read_text, write_text)
_BINARY = _Kind(read_binary, write_binary)
_PAIR = _Kind(_read_pair, lambda pair: write_text(pair[0]) + write_text(pair[1]))


def _any(value: Any) -> str | None:
    return None


def _flag(value: int) -> str | None:
    return None if value in (0, 1) else f"{value} is neither 0 nor 1"


def _not_zero(value: int) -> str | None:
    return None if value else "0 is not allowed"


def _row(kind: _Kind, packets: str, fault: Callable[[Any], str | None] = _any) -> _Row:
    return _Row(kind, frozenset(packets.split()), fault)


_MESSAGE = "PUBLISH WILL"
_ACKS = "CONNACK PUBACK PUBREC PUBREL PUBCOMP SUBACK UNSUBACK DISCONNECT AUTH"
_P = Property

TABLE: dict[Property, _Row] = {
    _P.PAYLOAD_FORMAT_INDICATOR: _row(_BYTE, _MESSAGE, _flag),
    _P.MESSAGE_EXPIRY_INTERVAL: _row(_UINT32, _MESSAGE),
    _P.CONTENT_TYPE: _row(_TEXT, _MESSAGE),
    _P.RESPONSE_TOPIC: _row(_TEXT, _MESSAGE, topic_name_fault),  # [MQTT-3.3.2-14]
    _P.CORRELATION_DATA: _row(_BINARY, _MESSAGE),
    _P.SUBSCRIPTION_IDENTIFIER: _row(_VARINT, "PUBLISH SUBSCRIBE", _not_zero),
    _P.SESSION_EXPIRY_INTERVAL: _row(_UINT32, "CONNECT CONNACK DISCONNECT"),
    _P.ASSIGNED_CLIENT_IDENTIFIER: _row(_TEXT, "CONNACK"),
    _P.SERVER_KEEP_ALIVE: _row(_UINT16, "CONNACK"),
    _P.AUTHENTICATION_METHOD: _row(_TEXT, "CONNECT CONNACK AUTH"),
    _P.AUTHENTICATION_DATA: _row(_BINARY, "CONNECT CONNACK AUTH"),
    _P.REQUEST_PROBLEM_INFORMATION: _row(_BYTE, "CONNECT", _flag),
    _P.WILL_DELAY_INTERVAL: _row(_UINT32, "WILL"),
    _P.REQUEST_RESPONSE_INFORMATION: _row(_BYTE, "CONNECT", _flag),
    _P.RESPONSE_INFORMATION: _row(_TEXT, "CONNACK"),
    _P.SERVER_REFERENCE: _row(_TEXT, "CONNACK DISCONNECT"),
    _P.REASON_STRING: _row(_TEXT, _ACKS),
    _P.RECEIVE_MAXIMUM: _row(_UINT16, "CONNECT CONNACK", _not_zero),
    _P.TOPIC_ALIAS_MAXIMUM: _row(_UINT16, "CONNECT CONNACK"),
    _P.TOPIC_ALIAS: _row(_UINT16, "PUBLISH", _not_zero),  # [MQTT-3.3.2-8]
    _P.MAXIMUM_QOS: _row(_BYTE, "CONNACK", _flag),
    _P.RETAIN_AVAILABLE: _row(_BYTE, "CONNACK", _flag),
    _P.USER_PROPERTY: _row(_PAIR, f"CONNECT {_MESSAGE} SUBSCRIBE UNSUBSCRIBE {_ACKS}"),
    _P.MAXIMUM_PACKET_SIZE: _row(_UINT32, "CONNECT CONNACK", _not_zero),
    _P.WILDCARD_SUBSCRIPTION_AVAILABLE: _row(_BYTE, "CONNACK", _flag),
    _P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: _row(_BYTE, "CONNACK", _flag),
    _P.SHARED_SUBSCRIPTION_AVAILABLE: _row(_BYTE, "CONNACK", _flag),
}

_LISTS = (Property.USER_PROPERTY, Property.SUBSCRIPTION_IDENTIFIER)
_BY_IDENTIFIER = {int(found): (found, row) for found, row in TABLE.items()}
_SPECIAL_REASONS = {Property.TOPIC_ALIAS: ReasonCode.TOPIC_ALIAS_INVALID}


def encode_properties(properties: Properties) -> bytes:
    """The property length and the properties."""
    if not properties:
        return b"\0"
    block = encode_block(properties)
    return write_varint(len(block)) + block


def encode_block(properties: Properties) -> bytes:
    """The properties without their length."""
    out = bytearray()
    for identifier, value in properties.items():
        write = TABLE[identifier].kind.write
        for item in value if identifier in _LISTS else (value,):
            out.append(identifier)
            out += write(item)
    return bytes(out)


def decode_properties(data: bytes, pos: int, end: int | None, packet: str) -> tuple[Properties, int]:
    """The properties whose length stands at `pos`, and the position after them; nothing from `end` on is theirs."""
    limit = len(data) if end is None else end
    size, pos = read_varint(data, pos, limit)
    if pos + size > limit:
        raise malformed(f"properties of {size} bytes end after {limit - pos}")
    return decode_block(data, pos, pos + size, packet), pos + size


def decode_block(data: bytes, pos: int, end: int, packet: str) -> Properties:
    """The properties in `data[pos:end]`, as they may stand in `packet`."""
    found: Properties = {}
    while pos < end:
        pos = _decode_one(data, pos, end, packet, found)
        if pos < end and data[pos] == Property.USER_PROPERTY and Property.USER_PROPERTY in found:
            pos = _decode_pairs(data, pos, end, found[Property.USER_PROPERTY])
    return found


def _decode_pairs(data: bytes, pos: int, end: int, pairs: list[tuple[str, str]]) -> int:
    """The user properties that follow one: a packet may have tens of thousands of them."""
    identifier = int(Property.USER_PROPERTY)
    try:
        while pos < end and data[pos] == identifier:
            name, pos = read_text(data, pos + 1, end)
            value, pos = read_text(data, pos, end)
            pairs.append((name, value))
    except MqttError as error:
        raise error.within(f"property {Property.USER_PROPERTY.name}") from None
    return pos


def _decode_one(data: bytes, pos: int, end: int, packet: str, found: Properties) -> int:
    # The identifier is a variable byte integer; all that exist fit one byte.
    known = _BY_IDENTIFIER.get(data[pos])
    if known is None:
        raise malformed(f"unknown property 0x{data[pos]:02X}")
    identifier, row = known
    if packet not in row.packets:  # 2.2.2.2
        raise malformed(f"property {identifier.name} does not belong here")
    try:
        value, pos = row.kind.read(data, pos + 1, end)
    except MqttError as error:
        raise error.within(f"property {identifier.name}") from None
    if fault := row.fault(value):
        reason = _SPECIAL_REASONS.get(identifier, ReasonCode.PROTOCOL_ERROR)
        raise ProtocolError(reason, f"property {identifier.name}: {fault}")
    if identifier not in found:
        found[identifier] = [value] if identifier in _LISTS else value
    elif identifier == Property.USER_PROPERTY or (identifier in _LISTS and packet == "PUBLISH"):
        found[identifier].append(value)
    else:
        raise protocol_error(f"property {identifier.name} stands there twice")
    return pos
