"""Bytes into packets, strictly.

`decode` gets the first byte and the body that the fixed header announced. One function per packet type reads the body from
front to back; what is left over is an error. Checks stand where the standard's clause is named. What depends on the side
(may a client send this?) or on earlier packets is `connection`'s.

Invariant: `decode` returns a packet or raises `MalformedPacket` or `ProtocolError`; nothing else, whatever the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sized

from tidegate.store.topic import topic_filter_fault, topic_name_fault

from .errors import MalformedPacket, MqttError, ProtocolError, malformed, protocol_error
from .packet_types import (
    PACKET_NAMES,
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
    Subscription,
    UnsubAck,
    Unsubscribe,
    Will,
)
from .properties import Properties, Property, decode_properties
from .reasons import ALLOWED, CONNECT_RETURN_CODES, ReasonCode
from .wire import read_binary, read_byte, read_text, read_uint16, text_of

FLAGS_TWO = (6, 8, 10)
"""PUBREL, SUBSCRIBE, UNSUBSCRIBE: their first byte ends in 0010, that of all others but PUBLISH in 0000 (2.1.3)."""

MAX_FILTERS = 10_000
"""Of one SUBSCRIBE or UNSUBSCRIBE; who has more sends several."""

LEVELS = {(b"MQIsdp", 3): 3, (b"MQTT", 4): 4, (b"MQTT", 5): 5}
"""Protocol names and levels that we speak."""


def decode(first_byte: int, body: bytes, version: int) -> Packet:
    """The packet; `version` is the connection's protocol level (a CONNECT names its own)."""
    check_first_byte(first_byte, version)
    kind = first_byte >> 4
    try:
        return _DECODERS[kind](_Body(body, version, first_byte))
    except MqttError as error:
        raise error.within(PACKET_NAMES[kind]) from None


def check_first_byte(first_byte: int, version: int) -> None:
    """Raise for packet types and flags that do not exist."""
    kind, flags = first_byte >> 4, first_byte & 15
    if kind == 0 or (kind == 15 and version < 5):
        raise protocol_error(f"packet type {kind} does not exist in this version")  # table 2-1
    if kind == 3:
        if flags & 6 == 6:
            raise malformed("PUBLISH: QoS 3")  # [MQTT-3.3.1-4]
        if flags & 14 == 8:
            raise malformed("PUBLISH: DUP with QoS 0")  # [MQTT-3.3.1-2]
    elif (flags & 7 if version == 3 else flags) != (2 if kind in FLAGS_TWO else 0):  # 3.1 has DUP here too
        raise malformed(f"{PACKET_NAMES[kind]}: the flags of the first byte are {flags:04b}")  # [MQTT-2.1.3-1]


def topic_name(raw: bytes) -> str:
    """`raw` as a topic name; raises `MalformedPacket` if it is none (4.7)."""
    try:
        text = text_of(raw)
    except MqttError as error:
        raise error.within("topic name") from None
    if fault := topic_name_fault(text):
        raise MalformedPacket(ReasonCode.MALFORMED_PACKET, f"topic name {text[:80]!r}: {fault}")
    return text


def topic_filter(text: str) -> str:
    """`text` if it is a topic filter; raises `MalformedPacket` if it is none (4.7, 4.8.2)."""
    if fault := topic_filter_fault(text):
        raise malformed(f"topic filter {text[:80]!r}: {fault}")
    return text


class _Body:
    """A reading position in a packet's body."""

    __slots__ = ("data", "end", "first_byte", "kind", "pos", "version")

    def __init__(self, data: bytes, version: int, first_byte: int) -> None:
        self.data = data
        self.pos = 0
        self.end = len(data)
        self.version = version
        self.first_byte = first_byte
        self.kind = PACKET_NAMES[first_byte >> 4]

    def byte(self) -> int:
        value, self.pos = read_byte(self.data, self.pos, self.end)
        return value

    def uint16(self) -> int:
        value, self.pos = read_uint16(self.data, self.pos, self.end)
        return value

    def binary(self, what: str) -> bytes:
        try:
            value, self.pos = read_binary(self.data, self.pos, self.end)
        except MqttError as error:
            raise error.within(what) from None
        return value

    def text(self, what: str) -> str:
        try:
            value, self.pos = read_text(self.data, self.pos, self.end)
        except MqttError as error:
            raise error.within(what) from None
        return value

    def packet_id(self) -> int:
        packet_id = self.uint16()
        if not packet_id:
            error = malformed if self.kind in ("SUBSCRIBE", "UNSUBSCRIBE") else protocol_error  # as mosquitto has it
            raise error("packet id 0")  # [MQTT-2.2.1-3]; 3.1.1: [MQTT-2.3.1-1]
        return packet_id

    def properties(self, of: str = "") -> Properties:
        if self.version < 5:
            return {}
        found, self.pos = decode_properties(self.data, self.pos, self.end, of or self.kind)
        return found

    def reason(self) -> ReasonCode:
        code = self.byte()
        reason = ALLOWED[self.kind].get(code)
        if reason is None:
            raise protocol_error(f"reason code 0x{code:02X} does not belong here")
        return reason

    def more(self) -> bool:
        return self.pos < self.end

    def finish(self) -> None:
        if self.pos != self.end:
            raise malformed(f"{self.end - self.pos} bytes too many")


def _connect(body: _Body) -> Connect:
    name = body.binary("protocol name")
    level = body.byte()
    version = LEVELS.get((name, level))
    if version is None:  # [MQTT-3.1.2-1], [MQTT-3.1.2-2]
        raise ProtocolError(ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, f"protocol {name[:20]!r} level {level}")
    body.version = version
    flags = body.byte()
    _check_connect_flags(flags, version)
    keep_alive = body.uint16()
    properties = body.properties()
    _check_authentication(properties)
    client_id = body.text("client identifier")
    will = _will(body, flags) if flags & 4 else None
    username = body.text("user name") if flags & 0x80 else None
    password = body.binary("password") if flags & 0x40 else None
    body.finish()
    return Connect(version, client_id, bool(flags & 2), keep_alive, username, password, will, properties)


def _check_connect_flags(flags: int, version: int) -> None:
    if flags & 1 and version > 3:
        raise malformed("the reserved connect flag is set")  # [MQTT-3.1.2-3]; 3.1 gave it no meaning
    if not flags & 4 and flags & 0x38:
        raise malformed("will QoS or will retain without a will")  # [MQTT-3.1.2-11, -13, -15]
    if flags & 0x18 == 0x18:
        raise malformed("will QoS 3")  # [MQTT-3.1.2-12]; 3.1.1: [MQTT-3.1.2-14]
    if version < 5 and flags & 0xC0 == 0x40:
        raise malformed("a password without a user name")  # 3.1.1: [MQTT-3.1.2-22]


def _check_authentication(properties: Properties) -> None:
    if Property.AUTHENTICATION_DATA in properties and Property.AUTHENTICATION_METHOD not in properties:
        raise protocol_error("authentication data without a method")  # 3.1.2.11.10


def _will(body: _Body, flags: int) -> Will:
    properties = body.properties("WILL")
    topic = topic_name(body.binary("will topic"))
    payload = body.binary("will payload")
    return Will(topic, payload, flags >> 3 & 3, bool(flags & 0x20), properties)


def _connack(body: _Body) -> ConnAck:
    flags = body.byte()
    if flags & 0xFE:
        raise malformed("reserved acknowledge flags are set")  # [MQTT-3.2.2-1]
    if body.version == 5:
        reason = body.reason()
    else:
        code = body.byte()
        if code >= len(CONNECT_RETURN_CODES):
            raise malformed(f"return code {code} is reserved")  # 3.1.1: table 3.1
        reason = CONNECT_RETURN_CODES[code]
    if flags and reason:
        raise protocol_error("session present beside a refusal")  # [MQTT-3.2.2-6]; 3.1.1: [MQTT-3.2.2-4]
    properties = body.properties()
    _check_authentication(properties)
    body.finish()
    return ConnAck(bool(flags), reason, properties)


def _publish(body: _Body) -> Publish:
    qos, dup = body.first_byte >> 1 & 3, bool(body.first_byte & 8)
    raw = body.binary("topic name")
    packet_id = body.packet_id() if qos else 0
    properties = body.properties()
    topic = topic_name(raw) if raw or Property.TOPIC_ALIAS not in properties else ""
    return Publish(topic, body.data[body.pos :], qos, bool(body.first_byte & 1), dup, packet_id, properties)


def _ack(body: _Body) -> tuple[int, ReasonCode, Properties]:
    packet_id = body.packet_id()
    if body.version < 5 or not body.more():
        body.finish()
        return packet_id, ReasonCode.SUCCESS, {}
    reason = body.reason()
    properties = body.properties() if body.more() else {}  # 3.4.2.2.1
    body.finish()
    return packet_id, reason, properties


def _subscribe(body: _Body) -> Subscribe:
    packet_id = body.packet_id()
    properties = body.properties()
    subscriptions: list[Subscription] = []
    while body.more():
        _bound(subscriptions)
        subscriptions.append(_subscription(body))
    if not subscriptions:
        raise protocol_error("no topic filter")  # [MQTT-3.8.3-2]; 3.1.1: [MQTT-3.8.3-3]
    return Subscribe(packet_id, tuple(subscriptions), properties)


def _bound(filters: Sized) -> None:
    """One packet of a megabyte could hold 260,000 of them, and stop everybody else for seconds."""
    if len(filters) >= MAX_FILTERS:
        raise ProtocolError(ReasonCode.QUOTA_EXCEEDED, f"more than {MAX_FILTERS} topic filters")


def _subscription(body: _Body) -> Subscription:
    text = topic_filter(body.text("topic filter"))
    options = body.byte()
    if options & (0xC0 if body.version == 5 else 0xFC):
        raise malformed("reserved subscription options are set")  # [MQTT-3.8.3-5]; 3.1.1: [MQTT-3-8.3-4]
    if options & 3 == 3:
        raise malformed("QoS 3 asked for")  # 3.8.3.1
    if options & 0x30 == 0x30:
        raise protocol_error("retain handling 3")  # 3.8.3.1
    if options & 4 and text.startswith("$share/"):
        raise protocol_error("no local on a shared subscription")  # [MQTT-3.8.3-4]
    return Subscription(text, options & 3, bool(options & 4), bool(options & 8), options >> 4 & 3)


def _suback(body: _Body) -> SubAck:
    packet_id = body.packet_id()
    properties = body.properties()
    reasons = []
    while body.more():
        reasons.append(body.reason())
        if body.version < 5 and reasons[-1] not in (0, 1, 2, 0x80):
            raise malformed(f"return code 0x{reasons[-1]:02X} is reserved")  # 3.1.1: [MQTT-3.9.3-2]
    if not reasons:
        raise protocol_error("no reason code")
    return SubAck(packet_id, tuple(reasons), properties)


def _unsubscribe(body: _Body) -> Unsubscribe:
    packet_id = body.packet_id()
    properties = body.properties()
    filters: list[str] = []
    while body.more():
        _bound(filters)
        filters.append(topic_filter(body.text("topic filter")))
    if not filters:
        raise protocol_error("no topic filter")  # [MQTT-3.10.3-2]
    return Unsubscribe(packet_id, tuple(filters), properties)


def _unsuback(body: _Body) -> UnsubAck:
    packet_id = body.packet_id()
    if body.version < 5:
        body.finish()
        return UnsubAck(packet_id)
    properties = body.properties()
    reasons = []
    while body.more():
        reasons.append(body.reason())
    if not reasons:
        raise protocol_error("no reason code")
    return UnsubAck(packet_id, tuple(reasons), properties)


def _pingreq(body: _Body) -> PingReq:
    body.finish()
    return PingReq()


def _pingresp(body: _Body) -> PingResp:
    body.finish()
    return PingResp()


def _disconnect(body: _Body) -> Disconnect:
    if body.version < 5 or not body.more():
        body.finish()
        return Disconnect()
    reason = body.reason()
    properties = body.properties() if body.more() else {}  # 3.14.2.2.1
    body.finish()
    return Disconnect(reason, properties)


def _auth(body: _Body) -> Auth:
    if not body.more():
        return Auth()  # 3.15.2.1
    reason = body.reason()
    properties = body.properties()
    if (reason or properties) and Property.AUTHENTICATION_METHOD not in properties:
        raise protocol_error("no authentication method")  # 3.15.2.2.2; the bare success of 3.15.2.1 has none
    body.finish()
    return Auth(reason, properties)


_DECODERS: dict[int, Callable[[_Body], Packet]] = {
    1: _connect,
    2: _connack,
    3: _publish,
    4: lambda body: PubAck(*_ack(body)),
    5: lambda body: PubRec(*_ack(body)),
    6: lambda body: PubRel(*_ack(body)),
    7: lambda body: PubComp(*_ack(body)),
    8: _subscribe,
    9: _suback,
    10: _unsubscribe,
    11: _unsuback,
    12: _pingreq,
    13: _pingresp,
    14: _disconnect,
    15: _auth,
}
