"""One MQTT connection's incoming bytes as events: the hot path.

`receive(data)` gives what the bytes of one read mean. A PUBLISH is a plain tuple, a run of plain PUBACKs is one `Acks`,
every other packet its object from `packets`, and a broken rule a last `Fault`. Nothing is copied but topic name and payload.
A packet that is not complete waits in a buffer that the largest permitted packet bounds; it is looked at again only when
enough has come. Rules that need more than one packet are checked here: order, direction, topic aliases, size.

Invariant: how the bytes are cut into reads changes nothing but how PUBACKs are grouped into `Acks`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from .decoding import check_first_byte, decode, topic_name
from .encoding import encode
from .errors import MqttError, ProtocolError, malformed, protocol_error
from .packet_types import PACKET_NAMES, Auth, ConnAck, Connect, Disconnect, Packet, PubComp, PubRec, PubRel
from .properties import Property, decode_block, encode_block
from .reasons import NOT_FROM_CLIENT, NOT_FROM_SERVER, ReasonCode
from .unfinished import Unfinished
from .wire import read_varint

T = TypeVar("T")

MAX_TOPIC_NAMES = 50_000
MAX_SEEN_PROPERTIES = 32
SEEN_PROPERTIES_BYTES = 96


class Side(Enum):
    """Which end of the connection we are."""

    SERVER = "server"
    CLIENT = "client"


SERVER = Side.SERVER
CLIENT = Side.CLIENT

_RECEIVABLE = {
    SERVER: frozenset((1, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15)),
    CLIENT: frozenset((2, 3, 4, 5, 6, 7, 9, 11, 13, 14, 15)),
}
"""Packet types by the direction of flow (table 2-1)."""

_STRANGERS = dict.fromkeys(b"GPHDOC", "this looks like HTTP on a port for MQTT")
_STRANGERS[0x16] = "this looks like TLS on a port without TLS"
"""What the first byte of another protocol betrays, for the person who mixed up two ports."""

_OTHER, _PUBACK, _QOS_2_ACK = -1, -2, -3
_QOS_2_ACKS: dict[int, type[PubRec] | type[PubRel] | type[PubComp]] = {0x50: PubRec, 0x62: PubRel, 0x70: PubComp}


def _shape(first: int) -> int:
    """The size of a PUBLISH's packet id, or what else begins with this byte; an illegal PUBLISH is an `_OTHER`."""
    if first == 0x40:
        return _PUBACK
    if first in _QOS_2_ACKS:
        return _QOS_2_ACK
    if first >> 4 != 3 or first & 6 == 6 or first & 14 == 8:
        return _OTHER
    return 2 if first & 6 else 0


_SHAPES = tuple(_shape(first) for first in range(256))
_SHAPES_BEFORE: tuple[int, ...] = (_OTHER,) * 256
"""By first byte; before CONNECT or CONNACK nothing takes the fast way."""


@dataclass(frozen=True, slots=True)
class Acks:
    """A run of PUBACKs without reason codes, in order of arrival."""

    packet_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """The peer broke the standard: always the last event; the connection reads nothing after it."""

    error: MqttError


Event = tuple[T, int, int, bytes, bytes] | Packet | Acks | Fault
"""A PUBLISH is `(topic, flags, packet_id, payload, properties)`: `flags` the low four bits of its first byte, `packet_id` 0
with QoS 0, `properties` the checked 5.0 properties without their length and without Topic Alias."""


class TopicNames(dict[bytes, str]):
    """Raw topic name -> text; raises `MalformedPacket` for what is no topic name. Emptied when full."""

    def __missing__(self, raw: bytes) -> str:
        if len(self) >= MAX_TOPIC_NAMES:
            self.clear()
        text = self[raw] = topic_name(raw)
        return text


class Terms(Generic[T]):
    """What many connections have in common. `topics`: raw topic name -> what a PUBLISH event has of it."""

    __slots__ = ("max_packet_size", "second", "short", "side", "topic_alias_maximum", "topics", "unfinished")

    def __init__(
        self,
        topics: Mapping[bytes, T],
        max_packet_size: int,
        topic_alias_maximum: int = 0,
        side: Side = SERVER,
        unfinished: Unfinished | None = None,
    ) -> None:
        self.topics = topics
        self.max_packet_size = max_packet_size
        # Below these bounds of the length's first and second byte no packet can be too large, nor its length malformed.
        self.short = min(128, max_packet_size - 1)
        self.second = 128 if max_packet_size > 16_385 else 0
        self.topic_alias_maximum = topic_alias_maximum
        self.side = side
        self.unfinished = unfinished or Unfinished()


_NEW, _ESTABLISHED, _CLOSED = 0, 1, 2
"""Bits of a connection's state."""


class Connection(Generic[T]):
    """See the module. `version` is the protocol level, 0 before CONNECT; a client names its own."""

    __slots__ = ("_aliases", "_buffer", "_needed", "_offered", "_seen", "_state", "_terms", "version")

    def __init__(self, terms: Terms[T], version: int = 0) -> None:
        self.version = version
        self._terms = terms
        self._state = _NEW
        self._buffer: bytearray | bytes = b""
        self._needed = 0
        self._aliases: dict[int, bytes] | None = None
        self._seen: dict[bytes, None] | None = None
        """Property blocks that were checked and are forwarded as they are: devices repeat themselves."""
        self._offered = 0

    def receive(self, data: bytes) -> list[Event[T]]:
        """What `data` says, in order; nothing after a `Fault` or a DISCONNECT."""
        if self._state & _CLOSED:
            return []
        if self._needed:
            if len(self._buffer) + len(data) < self._needed:
                self._buffer += data
                self._terms.unfinished.hold(self, self._held())
                return []
            data = b"".join((self._buffer, data))
            self._needed = 0
        events: list[Event[T]] = []
        try:
            rest = self._scan(data, events)
        except MqttError as error:
            self._state |= _CLOSED
            events.append(Fault(error))
            rest = len(data)
        if self._needed:
            self._buffer = bytearray(data[rest:])
            self._terms.unfinished.hold(self, self._held())
        elif self._buffer:
            self._let_go()
        return events

    def end(self) -> None:
        """The connection is over: nothing more is read, and what waits for its rest does so no more."""
        self._state |= _CLOSED
        self._aliases = None
        self._let_go()

    def _let_go(self) -> None:
        self._buffer = b""
        self._terms.unfinished.hold(self, self._held())

    def _held(self) -> int:
        """Bytes of the incomplete packet and of topic aliases."""
        return len(self._buffer) + (sum(map(len, self._aliases.values())) if self._aliases else 0)

    def refusal(self, error: MqttError) -> bytes:
        """The last bytes for a peer whose `Fault` this is: CONNACK for a bad CONNECT, DISCONNECT in 5.0, or none."""
        if self._state & _ESTABLISHED:
            return encode(Disconnect(error.reason), 5) if self.version == 5 else b""
        if self._terms.side is CLIENT or not self._offered:
            return b""
        if self._offered < 5 and error.reason != ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
            return b""  # 3.1.1 closes without a word [MQTT-3.1.4-1], but for the level [MQTT-3.1.2-2]
        return encode(ConnAck(False, error.reason), self._offered)

    def _scan(self, data: bytes, events: list[Event[T]]) -> int:
        """Append what complete packets say; the position of the first byte that waits for more.

        Long on purpose: one more call per message would cost as much as a third of the message.
        """
        terms = self._terms
        topics, short, second = terms.topics, terms.short, terms.second
        publish, v5 = _SHAPES if self._state else _SHAPES_BEFORE, self.version == 5
        append = events.append
        pos, last = 0, len(data) - 1
        while pos < last:
            first = data[pos]
            id_size = publish[first]
            length = data[pos + 1]
            if id_size < 0:
                if id_size <= _PUBACK and length == 2 and pos + 2 < last:
                    pos = self._acks(data, pos, events) if id_size == _PUBACK else self._plain_ack(data, pos, events)
                    continue
                pos = self._other(data, pos, events)
                if self._needed or self._state & _CLOSED:
                    return pos
                publish, v5 = _SHAPES if self._state else _SHAPES_BEFORE, self.version == 5
                continue
            if 2 < length < short:
                start = pos + 4
                end = start - 2 + length
            elif length > 127 and pos + 2 <= last and 0 < data[pos + 2] < second:
                start = pos + 5
                end = start - 130 + length + (data[pos + 2] << 7)
            else:
                head = self._header(data, pos)
                if head is None:
                    return pos
                start, end = head[0] + 2, head[1]
                if end < start:
                    raise malformed("PUBLISH: ends inside the topic name")
            if end > last + 1:
                self._needed = end - pos
                return pos
            payload = start + (data[start - 2] << 8 | data[start - 1])
            topic = data[start:payload]
            packet_id = 0
            if id_size:
                if payload + 2 > end:
                    raise malformed("PUBLISH: ends inside topic name or packet id")
                packet_id = data[payload] << 8 | data[payload + 1]
                if not packet_id:
                    raise protocol_error("PUBLISH: packet id 0")  # [MQTT-2.2.1-3]; 3.1.1: [MQTT-2.3.1-1]
                payload += 2
            elif payload > end:
                raise malformed("PUBLISH: ends inside the topic name")
            if not v5:
                append((topics[topic], first & 15, packet_id, data[payload:end], b""))
            elif payload < end and not data[payload] and topic:
                append((topics[topic], first & 15, packet_id, data[payload + 1 : end], b""))
            else:
                topic, properties, payload = self._properties(topic, data, payload, end)
                append((topics[topic], first & 15, packet_id, data[payload:end], properties))
            pos = end
        if pos == last:
            self._needed = 2
        return pos

    def _properties(self, topic: bytes, data: bytes, pos: int, end: int) -> tuple[bytes, bytes, int]:
        """Of a PUBLISH in 5.0: the topic it means, its properties to be forwarded, where its payload begins."""
        try:
            size, pos = read_varint(data, pos, end)
            after = pos + size
            if after > end:
                raise malformed(f"properties of {size} bytes end after {end - pos}")
            block = data[pos:after]
            if topic and self._seen is not None and block in self._seen:
                return topic, block, after
            return *self._check_properties(topic, block), after
        except MqttError as error:
            raise error.within("PUBLISH") from None

    def _check_properties(self, topic: bytes, block: bytes) -> tuple[bytes, bytes]:
        found = decode_block(block, 0, len(block), "PUBLISH")
        if self._terms.side is SERVER and Property.SUBSCRIPTION_IDENTIFIER in found:
            raise protocol_error("a subscription identifier from a client")  # [MQTT-3.3.4-6]
        alias = found.pop(Property.TOPIC_ALIAS, None)
        if alias is not None:
            return self._aliased(topic, alias), encode_block(found)
        if not topic:
            raise protocol_error("neither topic name nor topic alias")  # 3.3.2.1
        if len(block) <= SEEN_PROPERTIES_BYTES:
            if self._seen is None or len(self._seen) >= MAX_SEEN_PROPERTIES:
                self._seen = {}
            self._seen[block] = None
        return topic, block

    def _aliased(self, topic: bytes, alias: int) -> bytes:
        """The topic that `alias` stands for from now on, or stood for before if `topic` is empty (3.3.2.3.4)."""
        if alias > self._terms.topic_alias_maximum:  # [MQTT-3.3.2-9]
            raise ProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, f"topic alias {alias} above {self._terms.topic_alias_maximum}")
        if topic:
            _ = self._terms.topics[topic]  # what is no topic name must not become an alias
            self._aliases = self._aliases or {}
            if self._aliases.get(alias) != topic:
                self._aliases[alias] = topic
                self._terms.unfinished.hold(self, self._held())
            return topic
        known = self._aliases.get(alias) if self._aliases is not None else None
        if known is None:
            raise protocol_error(f"topic alias {alias} was never set")
        return known

    def _other(self, data: bytes, pos: int, events: list[Event[T]]) -> int:
        """Take the packet at `pos`, whatever it is; the position after it (or `pos`, with `_needed` set, if incomplete)."""
        first = data[pos]
        kind = first >> 4
        self._check_kind(first, kind)
        head = self._header(data, pos)
        if head is None:
            return pos
        body, end = head
        if end > len(data):
            self._needed = end - pos
            return pos
        events.append(self._packet(first, data[body:end]))
        return end

    def _check_kind(self, first: int, kind: int) -> None:
        """Refuse by the first byte what must not come now, before its body is waited for."""
        if not self._state:
            self._check_first_packet(first, kind)
        check_first_byte(first, self.version)
        if kind not in _RECEIVABLE[self._terms.side] or (kind == 14 and self._terms.side is CLIENT and self.version < 5):
            raise protocol_error(f"{PACKET_NAMES[kind]} goes the other way")  # table 2-1
        if self._state and kind in (1, 2):
            raise protocol_error(f"a second {PACKET_NAMES[kind]}")  # [MQTT-3.1.0-2]

    def _check_first_packet(self, first: int, kind: int) -> None:
        if self._terms.side is CLIENT:
            if kind not in (2, 15):  # [MQTT-3.2.0-1]; AUTH may come before
                raise protocol_error(f"{PACKET_NAMES[kind] or 'packet type 0'} before CONNACK")
        elif first != 0x10:  # [MQTT-3.1.0-1]
            what = _STRANGERS.get(first, f"the first byte is 0x{first:02X}")
            raise protocol_error(f"the first packet is not CONNECT: {what}")

    def _header(self, data: bytes, pos: int) -> tuple[int, int] | None:
        """Where the body begins and ends; None if the remaining length is not complete (2.1.4)."""
        length, at = 0, pos + 1
        for shift in (0, 7, 14, 21):
            if at >= len(data):
                self._needed = at - pos + 1
                return None
            byte = data[at]
            at += 1
            length |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise malformed("the remaining length has more than four bytes")  # 2.1.4
        if shift and not byte and self.version == 5:
            raise malformed("the remaining length is longer than needed")  # [MQTT-1.5.5-1]; 3.1.1 permits it
        if at + length - pos > self._terms.max_packet_size:
            raise self._too_large(at + length - pos)
        return at, at + length

    def _too_large(self, size: int) -> ProtocolError:
        return ProtocolError(
            ReasonCode.PACKET_TOO_LARGE, f"a packet of {size} bytes, permitted are {self._terms.max_packet_size}"
        )

    def _acks(self, data: bytes, pos: int, events: list[Event[T]]) -> int:
        """All plain PUBACKs from `pos` on as one event."""
        end = pos + 4
        packet_ids: tuple[int, ...] = (data[pos + 2] << 8 | data[pos + 3],)
        if data[end : end + 2] == b"\x40\x02":
            end = _end_of_acks(data, pos)
            packet_ids = struct.unpack(f">{(end - pos) // 2}H", data[pos:end])[1::2]
        if 0 in packet_ids:
            packet_ids = packet_ids[: packet_ids.index(0)]
            if packet_ids:
                events.append(Acks(packet_ids))
            raise protocol_error("PUBACK: packet id 0")  # [MQTT-2.2.1-3]; 3.1.1: [MQTT-2.3.1-1]
        events.append(Acks(packet_ids))
        return end

    def _plain_ack(self, data: bytes, pos: int, events: list[Event[T]]) -> int:
        """A PUBREC, PUBREL or PUBCOMP of four bytes: three of these are the price of a message with QoS 2."""
        made = _QOS_2_ACKS[data[pos]]
        packet_id = data[pos + 2] << 8 | data[pos + 3]
        if not packet_id:
            raise protocol_error(f"{made.__name__.upper()}: packet id 0")  # [MQTT-2.2.1-3]; 3.1.1: [MQTT-2.3.1-1]
        events.append(made(packet_id))
        return pos + 4

    def _packet(self, first: int, body: bytes) -> Packet:
        try:
            packet = decode(first, body, self.version)
        except MqttError:
            if not self._state and first >> 4 == 1:
                self._offered = _offered_level(body)
            raise
        self._check_side(packet)
        if isinstance(packet, Connect):
            self.version = packet.version
        if isinstance(packet, Disconnect) or (isinstance(packet, ConnAck) and packet.reason):
            self._state |= _CLOSED  # [MQTT-3.14.4-1], [MQTT-3.2.2-7]: nothing may follow
        elif isinstance(packet, Connect | ConnAck):
            self._state |= _ESTABLISHED
        return packet

    def _check_side(self, packet: Packet) -> None:
        """Rules on who may say what."""
        if isinstance(packet, Disconnect | Auth):
            name = type(packet).__name__.upper()
            forbidden = NOT_FROM_CLIENT if self._terms.side is SERVER else NOT_FROM_SERVER
            if packet.reason in forbidden[name]:
                raise protocol_error(f"{name}: {packet.reason.label} comes from the other side only")
            if self._terms.side is CLIENT and Property.SESSION_EXPIRY_INTERVAL in packet.properties:
                raise protocol_error(f"{name}: session expiry from a server")  # [MQTT-3.14.2-2]


def _end_of_acks(data: bytes, pos: int) -> int:
    """Where the run of plain PUBACKs that begins at `pos` ends; looked at in growing windows, so that one PUBACK among
    other packets costs one small look."""
    end, limit, window = pos, pos + (len(data) - pos) // 4 * 4, 16
    while end < limit:
        stop = min(end + window, limit)
        types, lengths = data[end:stop:4], data[end + 1 : stop : 4]
        good = len(types) - max(len(types.lstrip(b"\x40")), len(lengths.lstrip(b"\x02")))
        end += 4 * good
        if end < stop:
            break
        window *= 4
    return end


def _offered_level(body: bytes) -> int:
    """The version in which a peer understands why its CONNECT was refused; 0 if it is no CONNECT of MQTT.

    Levels that nobody speaks get the older CONNACK. A bridge that marks its level with the highest bit reads it and tries
    again without, provided that the form is the one of its level.
    """
    for name in (b"\x00\x04MQTT", b"\x00\x06MQIsdp"):
        if body.startswith(name) and len(body) > len(name):
            return 5 if body[len(name)] & 0x7F == 5 else 4
    return 0
